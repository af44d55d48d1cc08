import Frames
import Synchrony

/// Why a process's own load or store did not happen.
public enum UserFault: Error, Equatable, Sendable {
    /// Kernel: SIGSEGV.
    case segmentation
    /// Kernel: SIGBUS: beyond the end of what is mapped, or the driver's answer.
    case bus
    /// Kernel: SIGBUS with `BUS_MCEERR_AR`.
    case poisoned
    /// Kernel: the OOM killer.
    case outOfMemory
    /// A fatal signal came while the access waited: the task ends, the access is never made. Kernel:
    /// `fault_signal_pending`.
    case killed

    init(_ error: FaultError) {
        switch error {
        case .segmentation: self = .segmentation
        case .bus: self = .bus
        case .poisoned: self = .poisoned
        case .outOfMemory: self = .outOfMemory
        }
    }

    /// What `copy_from_user` and its like make of it.
    public var errno: Errno {
        switch self {
        case .segmentation, .bus: .EFAULT
        case .poisoned: .EHWPOISON
        case .outOfMemory: .ENOMEM
        case .killed: .EINTR
        }
    }
}

/// The process's own loads and stores.
///
/// Translation and access happen under the page-table lock: what a processor gets from the primary TLB's flush (an
/// access that used the old entry is over before the change is) needs no modelled TLB this way.
extension AddressSpace {
    /// Reads 8 bytes; `address` is 8-byte aligned. Errors: EFAULT (SIGSEGV, SIGBUS, misaligned), EHWPOISON (SIGBUS for
    /// a poisoned page), ENOMEM, EINTR (a fatal signal while it waited).
    public func load(_ address: UserAddress) throws(Errno) -> UInt64 {
        do throws(UserFault) { return try access(address, store: nil) } catch { throw error.errno }
    }

    /// Writes 8 bytes. Errors as `load`.
    public func store(_ address: UserAddress, _ value: UInt64) throws(Errno) {
        do throws(UserFault) { _ = try access(address, store: value) } catch { throw error.errno }
    }

    /// Reads or writes 8 bytes, `address` a multiple of 8, and tells which signal came instead. Returns what was read
    /// or written.
    public func access(_ address: UserAddress, store value: UInt64?) throws(UserFault) -> UInt64 {
        guard address.value & 7 == 0, address < UserAddress.end else { throw .segmentation }
        while true {
            if let result = tryAccess(address, store: value) { return result }
            try fault(address, write: value != nil)
        }
    }

    /// Nil: the entry doesn't allow it.
    private func tryAccess(_ address: UserAddress, store value: UInt64?) -> UInt64? {
        withFrame(of: address, write: value != nil) { frame in
            let word = memory.word(at: frame.physicalAddress | address.offset)
            guard let value else { return word.loadData() }
            word.storeData(value)
            return value
        }
    }

    /// Calls `body` with the frame that the entry of `address` allows to be read, or written, and marks the entry as the
    /// processor does. Nil: the entry doesn't allow it. The page-table lock is held meanwhile.
    func withFrame<R>(of address: UserAddress, write: Bool, _ body: (HostFrame) -> R) -> R? {
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        guard let leaf = usableLeaf(address, write: write) else { return nil }
        let frame = leaf.frame(of: address)
        schedulingNote(.pageUse, frame.physicalAddress)
        return body(frame)
    }

    /// The leaf for an access of the process, with its accessed and dirty bits set; nil if the entry doesn't allow it.
    /// Caller holds `pageTableLock`.
    func usableLeaf(_ address: UserAddress, write: Bool) -> HostLeaf? {
        guard let leaf = leaf(address), leaf.entry.isPresent, leaf.entry.isWritable || !write else { return nil }
        let bits = write ? HostEntry.accessed | HostEntry.dirty : HostEntry.accessed
        if leaf.entry.bits & bits != bits { _ = leaf.word.fetchOr(bits) }
        return leaf
    }

    /// One fault of the process itself: a signal if it may not. Kernel: `do_user_addr_fault`.
    func fault(_ address: UserAddress, write: Bool) throws(UserFault) {
        mmapLock.lockForRead()
        guard let vma = find(address), vma.allows(write: write) else {
            mmapLock.unlockRead()
            throw .segmentation
        }
        let outcome = handleFault(vma, address, write ? .write : .read)
        mmapLock.unlockRead()
        if case .failed(let error) = outcome {
            if case .outOfMemory = error, host.makeRoom() { return }
            throw UserFault(error)
        }
        if case .done = outcome { return }
        // A plain signal ends the wait too, but its handler returns to the access: it is as if the wait went on.
        outcome.wait()
        if signals.fatal { throw .killed }
    }
}

extension VMA {
    /// Kernel: `access_error`, `vma_permits_fault`. A mapping that may only be written can be read too, as on x86.
    func allows(write: Bool) -> Bool { write ? flags.write : flags.isAccessible }
}
