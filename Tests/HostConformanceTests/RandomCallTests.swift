import HostConformance
import Testing

/// The model's host beside the kernel that runs the tests. Spec: generic 1.9, 3.1.
@Suite(.serialized) struct HostConformance_RandomCalls {
    private static let reason: String? = {
        do throws(HostConformance.Unavailable) {
            _ = try HostConformance()
            return nil
        } catch { return error.reason }
    }()

    @Test(.enabled(if: reason == nil, Comment(rawValue: reason ?? "")))
    func `20,000 random calls have the same answers and leave the same pages`() throws {
        let conformance = try HostConformance()
        let seed: UInt64 = 1
        let report = try conformance.run(steps: 20_000, seed: seed)
        #expect(report.difference == nil, "seed \(seed)\n\(report.difference.map { "\($0)" } ?? "")")
        #expect(report.steps == 20_000 || report.difference != nil)
        // Each call was made, and each kind of answer came.
        let names = report.histogram.keys
        for call in [
            "mmap anonymous private: 0", "mmap anonymous shared: 0", "mmap memfd private: 0", "mmap memfd shared: 0",
            "munmap: 0", "mprotect: 0", "mprotect: ENOMEM", "madvise MADV_DONTNEED: 0", "madvise MADV_NOHUGEPAGE: 0",
            "madvise MADV_POPULATE_READ: 0", "madvise MADV_POPULATE_WRITE: EINVAL", "madvise MADV_REMOVE: 0",
            "madvise MADV_REMOVE: EACCES", "mremap move: 0", "mremap move: EFAULT", "mremap grow: 0",
            "mremap grow: ENOMEM",
            "mremap shrink: 0", "load: value", "load: SIGSEGV", "load: SIGBUS", "store: value", "store: SIGSEGV",
            "store: SIGBUS", "fork: 0", "exit: 0", "ftruncate: 0", "fallocate punch: 0", "pread: value",
            "pwrite: value",
        ] {
            #expect(names.contains(call), "never: \(call)")
        }
    }
}
