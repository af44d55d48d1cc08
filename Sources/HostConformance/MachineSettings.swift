import Foundation
import Frames

/// What this machine's administrator chose, and a process can see.
enum MachineSettings {
    /// From debugfs, where it can be read; else the kernel's default, 64 KiB.
    static var faultAroundPages: Int {
        guard let text = text("/sys/kernel/debug/fault_around_bytes"),
            let bytes = Int(text.trimmingCharacters(in: .whitespacesAndNewlines)), bytes >= Int(pageSize)
        else { return 16 }
        return bytes / Int(pageSize)
    }

    /// A file of the kernel's, whose length is known only when it has been read. Nil: it can't be read.
    private static func text(_ path: String) -> String? {
        guard let file = FileHandle(forReadingAtPath: path) else { return nil }
        do {
            return try file.readToEnd().map { String(decoding: $0, as: UTF8.self) }
        } catch {
            return nil
        }
    }

    /// Whether areas that hold guards say so (`gu` in smaps), as those of 6.19 and of later 6.18 do. Before, a guard in a
    /// file's mapping changed with which neighbours it becomes one.
    static let showsGuards: Bool = {
        let length = Int(pageSize)
        guard let page = mmap(nil, length, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), page != MAP_FAILED else {
            return false
        }
        defer { munmap(page, length) }
        let installGuard: Int32 = 102
        guard madvise(page, length, installGuard) == 0,
            let areas = text("/proc/self/smaps")
        else { return false }
        return areas.split(separator: "\n").contains { $0.hasPrefix("VmFlags:") && $0.contains(" gu") }
    }()
}
