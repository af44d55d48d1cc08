import Frames
import Synchronization
import Synchrony

/// Taking a dying process's memory before it has exited. Kernel: `__oom_reap_task_mm`.
extension AddressSpace {
    /// The process is killed, and its private memory goes at once: what it and its vCPUs touch from now on is a SIGBUS.
    /// The notifiers may not sleep. False: a task changes the address space; try again. Kernel: `oom_reap_task_mm`.
    public func reap() -> Bool {
        signals.fatal = true
        guard mmapLock.tryLockForRead() else { return false }
        defer { mmapLock.unlockRead() }
        guard !hasExited else { return true }
        isUnstable.store(true, ordering: .releasing)
        for vma in vmas { vma.userFaults?.server.wake() }
        for vma in vmas where !vma.flags.shared && !vma.flags.pfnMap {
            var gather = Gather()
            notifyStart(vma.range, blockable: false)
            zap(vma.range, &gather)
            notifyEnd(vma.range, blockable: false)
            gather.flush(memory)
        }
        return true
    }
}
