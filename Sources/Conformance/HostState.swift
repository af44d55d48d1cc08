import Glibc
import Interface

// What others do to this machine while scripts run on it.

/// Whether this machine has a swap device now: somebody may switch one on or off at any time. Kernel: /proc/swaps, a line of
/// headings and one for each device.
func hostSwaps() -> Bool { lines(ofFile: "/proc/swaps").count > 1 }

/// Counts what the kernel's own threads do to pages of processes, at times that nobody knows: moving them for compaction,
/// taking them for reclaim. Two readings that are the same have nothing of it in between. Kernel: /proc/vmstat.
func disturbances(_ counts: [Substring] = lines(ofFile: "/proc/vmstat")) -> UInt64 {
    let names = ["pgmigrate_success ", "pgmigrate_fail ", "pgscan_kswapd ", "pgscan_direct ", "pgscan_khugepaged "]
    return counts.reduce(0) { sum, line in
        guard let name = names.first(where: line.hasPrefix) else { return sum }
        return sum &+ (UInt64(line.dropFirst(name.count)) ?? 0)
    }
}

/// Of a file of /proc, which says that it is empty; none if it can't be read.
func lines(ofFile path: String) -> [Substring] {
    guard let file = fopen(path, "re") else { return [] }
    defer { fclose(file) }
    var bytes = [UInt8](repeating: 0, count: 1 << 14)
    let count = fread(&bytes, 1, bytes.count, file)
    return String(decoding: bytes[..<count], as: UTF8.self).split(separator: "\n")
}

extension KernelFeatures {
    /// Runs a script while the host has a swap device all the time, or has none, and tells the model which.
    mutating func withSteadySwap<R, E: Error>(
        asking isOn: () -> Bool = hostSwaps, _ body: (KernelFeatures) throws(E) -> R
    ) throws(E) -> R {
        while true {
            swaps = isOn()
            let result = try body(self)
            if isOn() == swaps { return result }
        }
    }
}
