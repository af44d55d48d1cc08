import Foundation

/// Where this package lies.
enum Repository {
    /// The folder that holds `Package.swift`.
    static let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
        .deletingLastPathComponent()
}

/// An error that the compiler reported. Line 0: it named no place.
struct Diagnostic: Equatable, Sendable {
    let line: Int
    let message: String

    /// The errors in the compiler's output: `path:line:column: error: message`, or `<unknown>:0: error: message`.
    static func errors(in output: String) -> [Diagnostic] {
        output.split(separator: "\n").compactMap { line in
            if let match = line.wholeMatch(of: #/.+?:(\d+):\d+: error: (.*)/#) {
                return Diagnostic(line: Int(match.1) ?? 0, message: String(match.2))
            }
            guard let match = line.wholeMatch(of: #/<unknown>:0: error: (.*)/#) else { return nil }
            return Diagnostic(line: 0, message: String(match.1))
        }
    }
}

/// Compiles one file against the modules that were built for this very test run.
struct SnippetCompiler: Sendable {
    /// The folder of the `.swiftmodule` files.
    let modules: URL
    /// A module map for the core's one C header.
    let moduleMap: URL

    struct Outcome: Sendable {
        let status: Int32
        let text: String
        var errors: [Diagnostic] { Diagnostic.errors(in: text) }
    }

    enum Failure: Error {
        /// No folder around the running test holds `Modules/GuestMemory.swiftmodule`.
        case modulesNotFound(searched: [String])
    }

    static let shared = Result { try SnippetCompiler() }

    private init() throws {
        modules = try Self.findModules()
        // In the build folder: always the same path, so that the compiler's cache of C modules stays small.
        moduleMap = modules.deletingLastPathComponent().appending(path: "CSchedule-of-snippets.modulemap")
        let header = Repository.root.appending(path: "Sources/CSchedule/include/CSchedule.h").path
        try "module CSchedule { header \"\(header)\" export * }\n".write(
            to: moduleMap, atomically: true, encoding: .utf8)
    }

    /// The modules lie beside the test's executable, or beside the bundle that is named to the test's runner.
    private static func findModules() throws -> URL {
        var searched: [String] = []
        for path in CommandLine.arguments + [Bundle.main.executablePath ?? ""] where path.contains("/") {
            var folder = URL(fileURLWithPath: path)
            for _ in 0..<5 {
                folder.deleteLastPathComponent()
                let modules = folder.appending(path: "Modules")
                searched.append(modules.path)
                if FileManager.default.fileExists(atPath: modules.appending(path: "GuestMemory.swiftmodule").path) {
                    return modules
                }
            }
        }
        throw Failure.modulesNotFound(searched: searched)
    }

    /// Compiles `file` down to checked SIL, where ownership and lifetimes are diagnosed, and throws the result away.
    func compile(_ file: URL, warningsAreErrors: Bool) throws -> Outcome {
        let process = Process()
        process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
        process.arguments =
            [
                "swiftc", "-emit-sil", "-o", "/dev/null", "-parse-as-library", "-module-name", "Snippet",
                "-swift-version", "6", "-enable-experimental-feature", "Lifetimes", "-diagnostic-style", "llvm",
                "-I", modules.path, "-Xcc", "-fmodule-map-file=\(moduleMap.path)",
            ] + (warningsAreErrors ? ["-warnings-as-errors"] : ["-suppress-warnings"]) + [file.path]
        let output = Pipe()
        process.standardOutput = output
        process.standardError = output
        process.standardInput = FileHandle.nullDevice
        try process.run()
        let data = try output.fileHandleForReading.readToEnd() ?? Data()
        process.waitUntilExit()
        return Outcome(status: process.terminationStatus, text: String(decoding: data, as: UTF8.self))
    }
}
