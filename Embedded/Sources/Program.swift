// The core in Embedded Swift, linked against libc alone: memory, tables and walks of both architectures, checked step
// by step. Prints a line a check; the exit status is 1 if one fails.

import Audit
import Frames
import Hardware
import HostMemory
import Synchrony

/// Without arguments: the checks. With paths of plans: runs them and prints their digests.
@c(main) func program(_ count: Int32, _ arguments: UnsafePointer<UnsafePointer<CChar>?>) -> Int32 {
    if count > 1 {
        for i in 1..<Int(count) {
            guard let path = arguments[i], runPlan(at: path) else { return 2 }
        }
        return 0
    }
    var checks = Checks()
    let ramFrames = 4096
    let arena = UnsafeMutableRawPointer.allocate(byteCount: ramFrames * Int(pageSize), alignment: Int(pageSize))
    defer { arena.deallocate() }
    let journal = Journal()
    let memory = PhysicalMemory(arena: arena, ramFrames: ramFrames, arenaIsZero: false, journal: journal)
    let host = Host(memory: memory, transparentHugePages: false)

    walkEPT(host, &checks)
    walkGStage(host, &checks)

    checks.expect(journal.findings.isEmpty, "no invariant is broken")
    checks.expect(LockViolations.ofCurrentTask().order == 0, "the lock order holds")
    checks.expect(LockViolations.ofCurrentTask().sleeping == 0, "nobody sleeps under a spinning lock")
    return checks.failed == 0 ? 0 : 1
}

/// Counts and prints.
struct Checks {
    private(set) var failed = 0

    mutating func expect(_ condition: Bool, _ what: StaticString) {
        if !condition { failed += 1 }
        print(condition ? "ok     " : "FAILED ", terminator: "")
        print(what)
    }
}
