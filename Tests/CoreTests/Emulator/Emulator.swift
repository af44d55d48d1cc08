import Foundation
import Frames
import Hardware
import HostMemory
import Testing

/// QEMU's processor, which nobody here wrote: it runs a guest on nested tables, one instruction for each access.
///
/// Asked for by FAULTLINE_EMULATOR=1. It needs Debian's qemu-system-x86, and clang and ld.lld, which Swift's toolchain has.
struct Emulator {
    enum Kind: UInt64, CaseIterable {
        case load = 0
        case store = 16
        case fetch = 32

        var access: AccessKind {
            switch self {
            case .load: .read
            case .store: .write
            case .fetch: .execute
            }
        }
    }

    struct Probe: Equatable {
        var kind: Kind
        /// A guest physical address below 4 GiB.
        var address: UInt64
    }

    struct Answer: Equatable, CustomStringConvertible {
        /// 0x78: the guest halted, so its access went through. 0x400: a nested page fault.
        var exit: UInt64
        var code: UInt64 = 0
        var address: UInt64 = 0
        var value: UInt64 = 0
        var description: String {
            [exit, code, address, value].map { String($0, radix: 16) }.joined(separator: " ")
        }
    }

    /// Where the model's memory, from 0 on, is in the emulator's: there other things are at 0.
    private static let offset: UInt64 = 0x100_0000
    private static let size = 4 << 20

    /// Nil: it is there. Else why the tests are passed over.
    static let missing: String? = {
        guard ProcessInfo.processInfo.environment["FAULTLINE_EMULATOR"] != nil else {
            return "set FAULTLINE_EMULATOR=1 to compare with an emulator"
        }
        for program in ["qemu-system-x86_64", "clang", "ld.lld"] where path(of: program) == nil {
            return "there is no program \(program)"
        }
        return nil
    }()

    private static func path(of program: String) -> String? {
        let folders = (ProcessInfo.processInfo.environment["PATH"] ?? "").split(separator: ":")
        return folders.map { "\($0)/\(program)" }.first { FileManager.default.isExecutableFile(atPath: $0) }
    }

    private static func run(_ program: String, _ arguments: [String]) throws -> Int32 {
        let process = Process()
        process.executableURL = URL(fileURLWithPath: try #require(path(of: program)))
        process.arguments = arguments
        process.standardOutput = FileHandle.nullDevice
        try process.run()
        process.waitUntilExit()
        return process.terminationStatus
    }

    /// Gives `body` the paths of files in a folder that goes with its end.
    private static func inFolder<R>(_ body: ((String) -> String) throws -> R) throws -> R {
        let folder = FileManager.default.temporaryDirectory.appending(path: "faultline-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        // What the emulator said stands, and a folder that stays behind is the system's to clear.
        defer { try? FileManager.default.removeItem(at: folder) }
        return try body { folder.appending(path: $0).path }
    }

    /// What the emulator boots, the same for every walk.
    private static let image = Result {
        try inFolder { file in
            let source = URL(fileURLWithPath: #filePath).deletingLastPathComponent().appending(path: "walk.S").path
            try #require(try run("clang", ["--target=x86_64-unknown-none", "-c", source, "-o", file("walk.o")]) == 0)
            let link = [
                "-m", "elf_x86_64", "--image-base=0x100000", "--oformat", "binary", "-Ttext", "0x100000", "-e", "start",
                file("walk.o"), "-o", file("walk.bin"),
            ]
            try #require(try run("ld.lld", link) == 0)
            return try Data(contentsOf: URL(fileURLWithPath: file("walk.bin")))
        }
    }

    /// Walks the tables at `root`, which are in `memory` as it is now; the guest's code is the page at `code`. Gives the
    /// answers, and the memory afterwards.
    static func walk(
        _ memory: [UInt64], root: HostFrame, levels: UInt8 = 4, code: UInt64, _ probes: [Probe]
    ) throws -> (answers: [Answer], memory: [UInt64]) {
        let program = try image.get()
        return try inFolder { file in try walk(program, memory, root, levels, code, probes, file) }
    }

    private static func walk(
        _ image: Data, _ memory: [UInt64], _ root: HostFrame, _ levels: UInt8, _ code: UInt64, _ probes: [Probe],
        _ file: (String) -> String
    ) throws -> (answers: [Answer], memory: [UInt64]) {
        try image.write(to: URL(fileURLWithPath: file("walk.bin")))
        var moved = memory + Array(repeating: 0, count: size / 8 - memory.count)
        var tables = Relocation(levels: levels)
        tables.move(&moved, root, level: levels, by: offset)
        try bytes(of: moved).write(to: URL(fileURLWithPath: file("memory")))
        var jobs: [UInt64] = [UInt64(probes.count), root.physicalAddress + offset, code]
        for probe in probes { jobs += [probe.kind.rawValue, probe.address] }
        try bytes(of: jobs).write(to: URL(fileURLWithPath: file("jobs")))

        let status = try run(
            "qemu-system-x86_64",
            [
                "-accel", "tcg", "-cpu", "qemu64,+svm,+npt,+nx,+pdpe1gb,phys-bits=46", "-m", "64", "-display", "none",
                "-nodefaults", "-no-reboot", "-kernel", file("walk.bin"), "-device",
                "loader,file=\(file("memory")),addr=0x1000000,force-raw=on", "-device",
                "loader,file=\(file("jobs")),addr=0x2000000,force-raw=on", "-debugcon", "file:\(file("out"))",
                "-device", "isa-debug-exit,iobase=0xf4,iosize=1",
            ])
        // The device's own way to say 0.
        try #require(status == 1, "the emulator ended with \(status)")
        let data = try Data(contentsOf: URL(fileURLWithPath: file("out")))
        try #require(data.count == probes.count * 32 + size)
        let words = data.withUnsafeBytes { raw in
            (0..<data.count / 8).map { raw.loadUnaligned(fromByteOffset: $0 * 8, as: UInt64.self) }
        }
        let answers = probes.indices.map {
            Answer(exit: words[$0 * 4], code: words[$0 * 4 + 1], address: words[$0 * 4 + 2], value: words[$0 * 4 + 3])
        }
        var after = Array(words[(probes.count * 4)...])
        tables.moveBack(&after, by: offset)
        return (answers, Array(after.prefix(memory.count)))
    }

    private static func bytes(of words: [UInt64]) -> Data { words.withUnsafeBytes { Data($0) } }
}

/// Entries of tables that name memory: those change when memory is elsewhere.
private struct Relocation {
    let levels: UInt8
    private var entries: [Int] = []

    init(levels: UInt8) { self.levels = levels }

    private static let field: UInt64 = 0x000f_ffff_ffff_f000

    mutating func move(_ memory: inout [UInt64], _ table: HostFrame, level: UInt8, by offset: UInt64) {
        for i in 0..<512 {
            let place = Int(table.number) * 512 + i
            let entry = memory[place]
            // What has a reserved bit leads nowhere.
            guard entry & 1 != 0, Int((entry & Self.field) >> 12) < memory.count / 512, !entries.contains(place) else {
                continue
            }
            let isLeaf = level == 1 || entry & 0x80 != 0
            memory[place] = entry + offset
            entries.append(place)
            if !isLeaf { move(&memory, HostFrame((entry & Self.field) >> 12), level: level - 1, by: offset) }
        }
    }

    func moveBack(_ memory: inout [UInt64], by offset: UInt64) {
        for place in entries { memory[place] -= offset }
    }
}
