import ArgumentParser
import Foundation
import Report

/// The command. Exit status: 0 nothing found, 1 findings, 2 unusable input or usage, 3 can't be done on this machine.
struct Faultline: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "faultline",
        abstract: "KVM's guest-memory core in a laboratory: run a guest-memory situation with every page reference on a"
            + " ledger.",
        discussion: """
            Exit status: 0 nothing found, 1 findings, 2 unusable input or usage, 3 what was asked can't be done here.
            """,
        version: "0.1.0",
        subcommands: [
            Run.self, Compare.self, Check.self, Defects.self, Ioctl.self, Conform.self, Audit.self,
            ReplayRecording.self, Walks.self, Bench.self,
            Schema.self,
            PlanBytes.self,
            Digest.self,
        ])
}

@main
enum Main {
    static func main() async {
        // Output goes through one write at the end, so a closed pipe ends us quietly.
        signal(SIGPIPE, SIG_DFL)
        do {
            var command = try Faultline.parseAsRoot()
            if var command = command as? any AsyncParsableCommand {
                try await command.run()
            } else {
                try command.run()
            }
        } catch let failure as Failure {
            if !failure.message.isEmpty { printError(failure.message) }
            exit(failure.status.rawValue)
        } catch {
            let status = Faultline.exitCode(for: error)
            let message = Faultline.fullMessage(for: error)
            if status.isSuccess { print(message) } else { printError(message) }
            exit(status == .validationFailure ? Status.unusable.rawValue : status.rawValue)
        }
    }

    private static func printError(_ text: String) {
        FileHandle.standardError.write(Data((text.hasSuffix("\n") ? text : text + "\n").utf8))
    }
}

enum Status: Int32 {
    case clean = 0
    case findings = 1
    case unusable = 2
    case impossibleHere = 3
}

/// Ends the command with a status and, if there is one, a message on standard error.
struct Failure: Error {
    var status: Status
    var message: String
    init(_ status: Status, _ message: String = "") {
        self.status = status
        self.message = message
    }
}

extension Terminal {
    /// What standard output can show.
    static var standardOutput: Terminal {
        let environment = ProcessInfo.processInfo.environment
        let plain = environment["NO_COLOR"].map { !$0.isEmpty } ?? false
        let color = isatty(STDOUT_FILENO) == 1 && !plain && environment["TERM"] != "dumb"
        return Terminal(color: color, width: 110)
    }
}

func output(_ text: String) { FileHandle.standardOutput.write(Data(text.utf8)) }
