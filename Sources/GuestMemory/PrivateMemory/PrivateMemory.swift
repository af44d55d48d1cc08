// PrivateMemory: guest memory that the host can't map. A `GuestMemoryFile` holds it, a slot binds a stretch of the file,
// and an attribute of each guest frame says whether the guest uses this memory or the slot's user memory.
//
// It guarantees: a private page is reached only through a binding, comes with exactly one reference, and is mapped only
// after the retry check; whoever takes a page or a binding away goes through the same begin and end as a notifier. No
// slot is ever left with a file that is gone, and no file with a slot that is gone (I-25).
//
// Read `GuestMemoryFile.swift` next, then `PrivateFault.swift`.

import Frames
import Synchronization
import Synchrony

/// What kind of VM it is. Kernel: the type argument of `KVM_CREATE_VM`.
public enum VirtualMachineType: UInt8, Sendable, CaseIterable {
    /// Kernel: `KVM_X86_DEFAULT_VM`.
    case standard
    /// Guest frames can be private, and nothing but their attribute says which are: there is no shared bit in the guest's
    /// addresses. For development and tests, in Linux too. Kernel: `KVM_X86_SW_PROTECTED_VM`.
    case softwareProtected

    /// Kernel: `kvm_arch_has_private_mem`.
    public var hasPrivateMemory: Bool { self == .softwareProtected }
}

/// What a VM keeps for its private memory.
final class PrivateMemory: @unchecked Sendable {
    // Unchecked: `openFiles` is touched only under `filesLock`.
    /// Who follows a slot's weak pointer to its file. Kernel: RCU.
    let readers = ReadSideSections(atomic: true)
    let attributes = FrameAttributes()
    private let filesLock = SpinLock(.objectIndex)
    /// Files from their making to the end of their release: an open file lives without anybody's help.
    private var openFiles: [GuestMemoryFile] = []
    /// Files whose last reference is gone and whose release could not run where that happened, the last one first.
    private let dying = Atomic<UnsafeMutableRawPointer?>(nil)
    private let dyingIdentity = ObjectIdentity()

    func add(_ file: GuestMemoryFile) {
        filesLock.lock()
        openFiles.append(file)
        filesLock.unlock()
    }

    func remove(_ file: GuestMemoryFile) {
        filesLock.lock()
        openFiles.removeAll { $0 === file }
        filesLock.unlock()
    }

    var files: [GuestMemoryFile] {
        filesLock.lock()
        defer { filesLock.unlock() }
        return openFiles
    }

    /// Puts a file aside whose last reference was dropped. Any lock may be held. Kernel: `task_work_add(____fput)`.
    func postpone(_ file: GuestMemoryFile) {
        schedulingPoint(.atomicUpdate, dyingIdentity.value)
        // Unretained: it is in `openFiles` until its release.
        let pointer = Unmanaged.passUnretained(file).toOpaque()
        var first = dying.load(ordering: .relaxed)
        while true {
            file.nextDying = first
            let (done, seen) = dying.compareExchange(
                expected: first, desired: pointer, ordering: .acquiringAndReleasing)
            if done { return }
            first = seen
        }
    }

    /// Releases the files that were put aside. No lock held, not inside `withSlots`. Kernel: `task_work_run`.
    func releasePostponed() {
        // A file that comes after this look is its own task's to release.
        guard dying.load(ordering: .relaxed) != nil else { return }
        schedulingPoint(.atomicUpdate, dyingIdentity.value)
        var next = dying.exchange(nil, ordering: .acquiringAndReleasing)
        while let pointer = next {
            let file = Unmanaged<GuestMemoryFile>.fromOpaque(pointer).takeUnretainedValue()
            next = file.nextDying
            file.release()
        }
    }
}

extension VirtualMachine {
    /// Whether guest frames can be private.
    public var hasPrivateMemory: Bool { type.hasPrivateMemory }

    /// Does what tasks of the VM left for a moment at which they hold no lock: releases files whose last reference they
    /// dropped. A vCPU does it on its way into the guest and out of `KVM_RUN`. Kernel: `task_work_run`.
    public func runPostponedWork() { privateMemory.releasePostponed() }
}
