import Glibc
import Testing

@testable import TraceAudit

/// The lines of a recording, to be audited as they are or doctored.
struct Recording {
    var lines: [String]

    init(_ text: String) {
        lines = text.split(separator: "\n", omittingEmptySubsequences: false).map(String.init)
        if lines.last == "" { lines.removeLast() }
    }

    var text: String { lines.joined(separator: "\n") + "\n" }

    func audit(piece: Int = .max) -> AuditReport { Self.audit(Array(text.utf8), piece: piece) }

    /// Audits bytes, handed over in pieces of `piece` bytes.
    static func audit(_ bytes: [UInt8], piece: Int = .max) -> AuditReport {
        let auditor = TraceAuditor()
        var position = 0
        while position < bytes.count {
            let end = piece >= bytes.count - position ? bytes.count : position + piece
            auditor.feed(Array(bytes[position..<end]))
            position = end
        }
        return auditor.finish(file: "recording")
    }

    /// Index of the `number`-th line (from 0) that has every one of `parts`.
    func index(of parts: String..., number: Int = 0, from start: Int = 0) throws -> Int {
        var left = number
        for index in start..<lines.count where parts.allSatisfy({ lines[index].contains($0) }) {
            if left == 0 { return index }
            left -= 1
        }
        throw MissingLine(parts: parts)
    }

    mutating func replace(_ old: String, with new: String, at index: Int) {
        guard let range = lines[index].firstRange(of: old) else {
            Issue.record("line \(index + 1) has no \(old): \(lines[index])")
            return
        }
        lines[index].replaceSubrange(range, with: new)
    }

    /// Inserts an event before line `index`, with that line's thread, processor and time.
    mutating func insert(_ event: String, before index: Int) throws {
        let line = lines[index]
        let colon = try #require(line.firstRange(of: ": "))
        lines.insert(line[..<colon.lowerBound] + ": " + event, at: index)
    }

    struct MissingLine: Error { var parts: [String] }
}

/// Where the recordings are, and whether they can be unpacked here.
enum Recordings {
    static let shipped = ["dontneed", "thp", "guest_pt_rewrite"]
    static let all = [
        "cold_64m", "dirtylog_4k", "dontneed", "fork_cow", "guest_pt_rewrite", "memslot_delete", "thp",
        "thp_full_walks", "two_vcpus",
    ]

    private static let root: String = {
        var parts = #filePath.split(separator: "/", omittingEmptySubsequences: false)
        parts.removeLast(3)
        return parts.joined(separator: "/")
    }()

    static let hasXZ: Bool = output(of: "command -v xz").isEmpty == false
    static func path(_ name: String) -> String {
        let shipped = "\(root)/Samples/\(name).ftrace.txt.xz"
        return access(shipped, R_OK) == 0 ? shipped : "\(root)/../shared/traces/\(name).ftrace.txt.xz"
    }
    static let binaryPath = "\(root)/../shared/traces/thp.dat.xz"

    static func isThere(_ name: String) -> Bool { hasXZ && access(path(name), R_OK) == 0 }
    static let allAreThere = all.allSatisfy(isThere)
    static let hasTraceCommand = output(of: "command -v trace-cmd").isEmpty == false
    static let binaryIsThere = hasXZ && hasTraceCommand && access(binaryPath, R_OK) == 0

    private static let unpacked: [String: Recording] = Dictionary(
        uniqueKeysWithValues: shipped.map { ($0, unpack($0)) })

    static func load(_ name: String) -> Recording { unpacked[name] ?? unpack(name) }

    private static func unpack(_ name: String) -> Recording {
        Recording(String(decoding: output(of: "xz -dc -- '\(path(name))'"), as: UTF8.self))
    }

    static func output(of command: String) -> [UInt8] {
        guard let pipe = popen(command, "r") else { return [] }
        defer { pclose(pipe) }
        var bytes: [UInt8] = []
        var buffer = [UInt8](repeating: 0, count: 1 << 16)
        while true {
            let count = fread(&buffer, 1, buffer.count, pipe)
            if count == 0 { return bytes }
            bytes.append(contentsOf: buffer[..<count])
        }
    }
}

/// Text of one event, with a prefix like ftrace's.
struct EventWriter {
    private(set) var lines: [String] = ["# tracer: nop", "#"]
    private var clock = 100_000
    var text: String { lines.joined(separator: "\n") + "\n" }

    mutating func add(_ event: String, thread: Int = 10, command: String = "vmm", process: Int? = nil, cpu: Int = 0) {
        clock += 1
        let column = process.map { "(\(String(repeating: " ", count: 6))\($0)) " } ?? ""
        let fraction = String(clock % 1_000_000)
        let padded = String(repeating: "0", count: 6 - fraction.count) + fraction
        lines.append(
            "            \(command)-\(thread) \(column)[00\(cpu)] d..1.  \(5 + clock / 1_000_000).\(padded): \(event)")
    }

    func audit() -> AuditReport { Recording.audit(Array(text.utf8)) }
}

extension AuditReport {
    func findings(_ rule: String) -> [Finding] { findings.filter { $0.rule == rule } }

    func status(_ rule: String) -> RuleStatus? { rules.first { $0.id == rule } }

    /// The only rules with findings.
    var brokenRules: [String] { rules.filter { $0.violations > 0 }.map(\.id).sorted() }
}
