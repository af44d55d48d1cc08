import Foundation
import Testing

/// The switch of fibers, by a C program of its own: registers, alignment, stacks used again, the guard page.
@Suite struct Fibers {
    private static let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
        .deletingLastPathComponent()

    private static func tool(_ names: String...) -> String? {
        let folders = ProcessInfo.processInfo.environment["PATH"]?.split(separator: ":") ?? []
        for name in names {
            for folder in folders where FileManager.default.isExecutableFile(atPath: "\(folder)/\(name)") {
                return "\(folder)/\(name)"
            }
        }
        return nil
    }

    private static let cross = tool("aarch64-linux-gnu-gcc")
    private static let emulator = tool("qemu-aarch64", "qemu-aarch64-static")
    private static let native = tool("clang", "cc", "gcc")

    private func run(_ program: String, _ arguments: [String]) throws -> (status: Int32, output: String) {
        let process = Process()
        let pipe = Pipe()
        process.executableURL = URL(fileURLWithPath: program)
        process.arguments = arguments
        process.standardOutput = pipe
        process.standardError = pipe
        try process.run()
        let output = String(decoding: pipe.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
        process.waitUntilExit()
        return (process.terminationStatus, output)
    }

    private func check(_ compiler: String, _ options: [String], _ launcher: [String]) throws {
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(at: folder) }  // A temporary folder that stays harms nobody.
        for optimization in ["-O0", "-O2"] {
            let program = folder.appendingPathComponent("fibers\(optimization)").path
            let compiled = try run(
                compiler,
                options + [
                    optimization, "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-I",
                    Self.root.appendingPathComponent("Sources/CFiber/include").path, "-o", program,
                    Self.root.appendingPathComponent("Tests/Fibers/fibers.c").path,
                    Self.root.appendingPathComponent("Sources/CFiber/fiber.c").path,
                ])
            #expect(compiled.status == 0, "\(compiled.output)")
            let result = try launcher.isEmpty ? run(program, []) : run(launcher[0], launcher.dropFirst() + [program])
            #expect(result.status == 0 && result.output == "ok\n", "\(optimization): \(result.output)")
        }
    }

    @Test(.enabled(if: native != nil, "no C compiler in the search path"))
    func `on this machine`() throws {
        try check(try #require(Self.native), [], [])
    }

    @Test(
        .enabled(
            if: cross != nil && emulator != nil,
            "AArch64: install Debian's gcc-aarch64-linux-gnu and qemu-user-static to run this"))
    func `on AArch64, cross-compiled and emulated`() throws {
        try check(try #require(Self.cross), ["-static"], [try #require(Self.emulator)])
    }
}
