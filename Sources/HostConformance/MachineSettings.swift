import Foundation
import Frames

/// What this machine's administrator chose, and a process can see.
enum MachineSettings {
    /// From debugfs, where it can be read; else the kernel's default, 64 KiB.
    static var faultAroundPages: Int {
        guard let text = try? String(contentsOfFile: "/sys/kernel/debug/fault_around_bytes", encoding: .utf8),
            let bytes = Int(text.trimmingCharacters(in: .whitespacesAndNewlines)), bytes >= Int(pageSize)
        else { return 16 }
        return bytes / Int(pageSize)
    }
}
