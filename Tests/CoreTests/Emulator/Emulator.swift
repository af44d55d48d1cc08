import Foundation
import Frames
import Hardware
import HostMemory
import Testing

/// QEMU's processor, which nobody here wrote: it runs a guest on tables, one instruction for each access.
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
        var address: UInt64
        /// At CPL 3, else 0.
        var isUser = false
    }

    struct Answer: Equatable, CustomStringConvertible {
        /// `halted`, or another exit code of SVM's.
        var exit: UInt64
        /// EXITINFO1, the error code of a fault.
        var code: UInt64 = 0
        /// EXITINFO2, the address of a page fault.
        var address: UInt64 = 0
        /// What was loaded; 0xf4 else.
        var value: UInt64 = 0xf4
        var description: String {
            [exit, code, address, value].map { String($0, radix: 16) }.joined(separator: " ")
        }

        /// The access went through, and the guest came to the halt after it.
        static let halted: UInt64 = 0x78
        static let protection: UInt64 = 0x4d
        static let pageFault: UInt64 = 0x4e
        static let nestedPageFault: UInt64 = 0x400
    }

    /// What the processor walks, and where it finds the guest's instructions.
    struct Setup {
        /// CR0, CR3, CR4 and EFER of the guest; off: it has no paging of its own. The mode says what code it runs.
        var registers = PagingRegisters(cr0: 0x11, cr3: 0, cr4: 0, efer: 0)
        /// nCR3: the root of nested tables.
        var nestedRoot: UInt64?
        /// Whether the host, and with it the nested tables, have five levels.
        var hostHasFiveLevels = false
        var physicalAddressBits = 46
        /// The page of the guest's instructions; another at CPL 3, since with SMEP no page serves both.
        var code: UInt64
        var userCode: UInt64?
    }

    /// The guest's instructions, each with a halt: load 4 bytes, store 1, jump.
    static let code: [(offset: UInt64, word: UInt64)] = [(0, 0xf4_038b), (16, 0xf4_0388), (32, 0xe3ff)]
    /// Where in a page an access goes, and a jump finds a halt, one byte; a store writes one.
    static let target: UInt64 = 0xff8
    static let halt: UInt64 = 0xf4

    /// The part of the emulator's memory that tests fill: elsewhere there are other things.
    static let window: UInt64 = 0x100_0000
    static let windowWords = 1 << 20

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

    /// Makes the accesses, one after the other, with a cold TLB each. `memory` is what is at `window`, and `more` what is
    /// from 4 GiB on. Gives the answers, and the window afterwards.
    static func walk(
        _ memory: [UInt64], _ setup: Setup, _ probes: [Probe], more: [UInt64] = []
    ) throws -> (answers: [Answer], memory: [UInt64]) {
        precondition(memory.count <= windowWords, "too much for the window")
        let program = try image.get()
        return try inFolder { file in try walk(program, memory, setup, probes, more, file) }
    }

    private static let jobs: UInt64 = 0x200_0000
    private static let answers: UInt64 = 0x300_0000

    private static func walk(
        _ image: Data, _ memory: [UInt64], _ setup: Setup, _ probes: [Probe], _ more: [UInt64],
        _ file: (String) -> String
    ) throws -> (answers: [Answer], memory: [UInt64]) {
        try image.write(to: URL(fileURLWithPath: file("walk.bin")))
        var loads: [(address: UInt64, words: [UInt64])] = [(window, memory), (jobs, orders(setup, probes))]
        if !more.isEmpty { loads.append((1 << 32, more)) }
        // With 3.5 GiB or more, what is above 3 GiB begins at 4 GiB.
        let size = more.isEmpty ? "128M" : "4G"
        var arguments = [
            "-accel", "tcg", "-display", "none", "-nodefaults", "-no-reboot", "-kernel", file("walk.bin"), "-cpu",
            "qemu64,+svm,+npt,+nx,+pdpe1gb,+la57,+smep,+smap,phys-bits=\(setup.physicalAddressBits)", "-m", size,
            "-object", "memory-backend-file,id=ram,share=on,size=\(size),mem-path=\(file("ram"))", "-machine",
            "memory-backend=ram", "-device", "isa-debug-exit,iobase=0xf4,iosize=1",
        ]
        for (number, load) in loads.enumerated() {
            let name = file("load\(number)")
            try load.words.withUnsafeBytes { Data($0) }.write(to: URL(fileURLWithPath: name))
            arguments += ["-device", "loader,file=\(name),addr=\(load.address),force-raw=on"]
        }
        let status = try run("qemu-system-x86_64", arguments)
        // The device's own way to say 0.
        try #require(status == 1, "the emulator ended with \(status)")
        let ram = try FileHandle(forReadingFrom: URL(fileURLWithPath: file("ram")))
        let words = try read(ram, answers, probes.count * 5)
        let told = probes.enumerated().map { number, probe in answer(to: probe, setup, words[(number * 5)...]) }
        return (told, try read(ram, window, memory.count))
    }

    private static func read(_ file: FileHandle, _ address: UInt64, _ count: Int) throws -> [UInt64] {
        try file.seek(toOffset: address)
        let data = try #require(try file.read(upToCount: count * 8))
        try #require(data.count == count * 8)
        return data.withUnsafeBytes { raw in
            (0..<count).map { raw.loadUnaligned(fromByteOffset: $0 * 8, as: UInt64.self) }
        }
    }

    /// What `walk.S` reads.
    private static func orders(_ setup: Setup, _ probes: [Probe]) -> [UInt64] {
        let registers = setup.registers
        let flags: UInt64 = (setup.nestedRoot == nil ? 0 : 1) | (setup.hostHasFiveLevels ? 2 : 0)
        // PE and ET; SVME, and LME with LMA.
        let efer = registers.efer | 1 << 12 | (registers.mode.isLong ? 1 << 8 | 1 << 10 : 0)
        var words = [
            UInt64(probes.count), flags, setup.nestedRoot ?? 0, registers.cr0 | 0x11, registers.cr3, registers.cr4,
            efer,
        ]
        for probe in probes {
            let level: UInt64 = probe.isUser ? 3 : 0
            // Type, S, DPL, P; L, or D.
            let code: UInt64 = (registers.mode.isLong ? 0xa9b : 0xc9b) | level << 5
            words += [
                setup.code(of: probe), probe.address, 2, 8 | level | code << 16,
                16 | level | (0xc93 | level << 5) << 16 | level << 32,
            ]
        }
        return words
    }

    private static func answer(to probe: Probe, _ setup: Setup, _ words: ArraySlice<UInt64>) -> Answer {
        let w = Array(words.prefix(5))
        let end = probe.kind == .fetch ? probe.address : setup.code(of: probe) + 2
        // At CPL 3 a halt is a general-protection fault, there.
        if w[0] == Answer.protection, probe.isUser, w[4] == end { return Answer(exit: Answer.halted, value: w[3]) }
        return Answer(exit: w[0], code: w[1], address: w[2], value: w[3])
    }
}

extension Emulator.Setup {
    /// Where the instruction of an access is.
    func code(of probe: Emulator.Probe) -> UInt64 { (probe.isUser ? userCode ?? code : code) + probe.kind.rawValue }
}
