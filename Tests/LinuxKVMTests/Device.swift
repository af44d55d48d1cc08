import Foundation
import IoctlScript
import LinuxKVM
import Testing

/// This machine's device.
enum Device {
    /// Why nothing here can be tested; nil: it can.
    static let reason: String? = {
        do throws(RealRun.Unavailable) {
            _ = try RealRun()
            return nil
        } catch {
            return error.reason
        }
    }()
}

extension Trait where Self == ConditionTrait {
    static var needsKVM: Self { .enabled(if: Device.reason == nil, "\(Device.reason ?? "")") }
}

extension Script {
    /// A script of `Scripts`, or of lines.
    static func named(_ name: String) throws -> Script {
        let folder = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
        return try Script(path: folder.appendingPathComponent("Scripts/\(name).ioctl").path)
    }

    init(_ lines: String...) throws { try self.init(text: lines.joined(separator: "\n"), file: "test") }
}

/// What /proc says of a process: nothing of one that has ended, also if it ends, or a descriptor of its is closed, while it
/// is read.
enum Process {
    /// What its descriptors stand for.
    static func descriptors(_ number: Int32) -> [String] {
        let folder = "/proc/\(number)/fd"
        let names = (try? FileManager.default.contentsOfDirectory(atPath: folder)) ?? []
        return names.compactMap { try? FileManager.default.destinationOfSymbolicLink(atPath: "\(folder)/\($0)") }
    }

    /// Its mappings, a line each.
    static func mappings(_ number: Int32) -> [String] {
        let text = (try? String(contentsOfFile: "/proc/\(number)/maps", encoding: .utf8)) ?? ""
        return text.split(separator: "\n").map(String.init)
    }

    /// Its children, of all its threads, zombies too.
    static func children(_ number: Int32) -> [Int32] {
        let folder = "/proc/\(number)/task"
        let threads = (try? FileManager.default.contentsOfDirectory(atPath: folder)) ?? []
        return threads.flatMap { thread in
            let text = (try? String(contentsOfFile: "\(folder)/\(thread)/children", encoding: .utf8)) ?? ""
            return text.split(separator: " ").compactMap { Int32($0) }
        }
    }

    static func exists(_ number: Int32) -> Bool { kill(number, 0) == 0 }
}
