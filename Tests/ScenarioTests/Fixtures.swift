import Machine
import Testing
import TextInput

@testable import Scenario

/// The repository's root, from this file's place in it.
let repository = #filePath.split(separator: "/", omittingEmptySubsequences: false).dropLast(3).joined(separator: "/")

func bytes(of path: String) throws -> [UInt8] { try readBytes(of: .scenario, file: "\(repository)/\(path)") }
func text(of path: String) throws -> String { String(decoding: try bytes(of: path), as: UTF8.self) }

/// The scenarios that ship, without `.yaml`.
let shipped =
    [
        "virtio-gpu-blob", "device-bar", "anonymous", "copy-on-write", "read-only-slot", "buffer-eviction-while-mapped",
        "memslot-delete", "dirty-logging", "huge-page", "fork-under-guest", "pfnmap-write-upgrade", "zero-page",
        "reserved-memory", "counted-pfnmap", "mixed-map", "host-map-pfnmap", "hugetlb", "hugetlb-gigantic",
        "driver-fault",
        "signal", "race-signal", "precopy", "precopy-manual", "precopy-dma", "diff-snapshot", "race-precopy",
        "race-precopy-start", "race-precopy-manual", "race-snapshot", "dirty-ring", "race-dirty-ring", "private-memory",
        "race-private", "race-frame-cache", "async-fault", "race-async-fault", "prefault", "race-mmio-slot",
        "huge-page-logged",
        "race-eager-split", "race-log-end", "race-ring-end",
    ] + shippedForShadow

/// Those of them whose guest changes its own page tables.
let shippedForShadow = [
    "shadow-own-tables", "shadow-unsync", "shadow-write-protect", "shadow-dirty-log", "shadow-mmio",
    "shadow-shootdown", "race-shadow-walk", "race-shadow-unmap", "race-shadow-sync", "race-shadow-zap",
    "race-shadow-log", "race-shadow-clear-log", "race-shadow-exchange", "race-shadow-shootdown", "race-shadow-table",
    "race-shadow-punch",
    "shadow-zero-page", "shadow-two-frames", "shadow-window",
]

/// Those of them whose VM only x86 has.
let shippedForX86 = ["private-memory", "race-private"]

func load(shipped name: String) throws -> ScenarioFile {
    try loadScenario(path: "\(repository)/Scenarios/\(name).yaml")
}

/// A small scenario whose parts a test can replace.
struct Sketch {
    var top = ""
    var host = ""
    var regions = "    - {name: ram, kind: anonymous, size: 64 KiB}"
    var vm = ""
    var slots = "    - {slot: 0, guest_phys_addr: 0x10000, userspace_addr: ram}"
    var phases = "  - vcpu0:\n      - read: ram"

    var text: String {
        [
            "name: sketch", top, "host:", host, "  regions:", regions, "vm:", vm, "  slots:", slots, "phases:", phases,
        ].filter { !$0.isEmpty }.joined(separator: "\n") + "\n"
    }

    /// The position at which `part` stands in the text, from 1.
    func position(of part: String, after prefix: String = "") -> (line: Int, column: Int) {
        let lines = text.split(separator: "\n", omittingEmptySubsequences: false)
        for (index, line) in lines.enumerated() {
            guard let range = line.range(of: prefix + part) else { continue }
            let column = line.distance(from: line.startIndex, to: range.lowerBound) + prefix.count + 1
            return (index + 1, column)
        }
        return (0, 0)
    }
}

extension Substring {
    func range(of part: String) -> Range<Index>? {
        var start = startIndex
        while start < endIndex {
            if self[start...].hasPrefix(part) { return start..<index(start, offsetBy: part.count) }
            start = index(after: start)
        }
        return nil
    }
}

func errors(_ text: String) -> [ScenarioError] { errors(Array(text.utf8)) }

func errors(_ bytes: [UInt8]) -> [ScenarioError] {
    do throws(ScenarioErrors) {
        _ = try loadScenario(bytes: bytes, file: "test.yaml")
        return []
    } catch {
        return error.errors
    }
}

/// Expects exactly one error, at the place where `part` stands.
func expectOne(
    _ sketch: Sketch, at part: String, after prefix: String = "", _ message: String, hint: String? = nil,
    sourceLocation: SourceLocation = #_sourceLocation
) {
    let found = errors(sketch.text)
    #expect(found.map(\.message) == [message], sourceLocation: sourceLocation)
    guard let error = found.first else { return }
    let (line, column) = sketch.position(of: part, after: prefix)
    #expect((error.line, error.column) == (line, column), "\(error)", sourceLocation: sourceLocation)
    if let hint { #expect(error.hint == hint, sourceLocation: sourceLocation) }
    #expect(!error.hint.isEmpty, sourceLocation: sourceLocation)
}

/// Expects exactly one error at a line and a column.
func expectOne(
    _ bytes: [UInt8], _ line: Int, _ column: Int, _ message: String, sourceLocation: SourceLocation = #_sourceLocation
) {
    let found = errors(bytes)
    #expect(found.map(\.message) == [message], sourceLocation: sourceLocation)
    guard let error = found.first else { return }
    #expect((error.line, error.column) == (line, column), sourceLocation: sourceLocation)
    #expect(!error.hint.isEmpty, sourceLocation: sourceLocation)
}

/// The same, for something that stands in the text more than once.
func expectOne(
    _ sketch: Sketch, at part: String, after prefix: String, _ message: String, line: Int,
    sourceLocation: SourceLocation = #_sourceLocation
) {
    let found = errors(sketch.text)
    #expect(found.map(\.message) == [message], sourceLocation: sourceLocation)
    #expect(found.map(\.line) == [line], sourceLocation: sourceLocation)
}
