import Audit
import Frames
import HostMemory
import Synchronization
import Synchrony

extension FrameCache {
    /// The frame whose kernel mapping the cache has, valid or not. Kernel: `gpc->pfn`.
    var frame: HostFrame? { mapping?.frame }

    /// Goes to `place` and makes sure that its frame is mapped. EFAULT: it can't be, and the cache maps nothing.
    /// Caller holds `refreshLock`, is inside `withSlots`, and has seen that the cache is active.
    /// Kernel: `__kvm_gpc_refresh`. Spec: generic 2.14.
    @export(interface)
    func renew(_ place: Place) throws(Errno) {
        var dropped: KernelMapping? = nil
        lock.lockForWrite()
        let works = goTo(place, &dropped)
        if !works {
            isValid = false
            dropped = mapping.take()
        }
        lock.unlockWrite()
        // Only now: to undo a kernel mapping may sleep.
        _ = consume dropped
        if !works { throw .EFAULT }
    }

    /// Caller holds `lock` for writing; it is dropped and taken again where the frame must be looked up.
    private func goTo(_ place: Place, _ dropped: inout KernelMapping?) -> Bool {
        let pageBefore = userAddress?.page
        userAddress = locate(place)
        guard let userAddress else { return false }
        if isValid, userAddress.page == pageBefore { return true }
        return establish(userAddress, &dropped)
    }

    /// The user address of `place`; nil: no slot, one that is being deleted, or one that can't be written. The slots are
    /// looked at again when their generation, or the place, is another. Caller holds `lock` for writing.
    private func locate(_ place: Place) -> UserAddress? {
        switch place {
        case .user(let address):
            guestAddress = nil
            slot = nil
            return address
        case .guest(let address):
            let slots = vm.slotSets[0].active
            let current = slots.generation.load(ordering: .acquiring)
            if address == guestAddress, generation == current, let userAddress { return userAddress }
            guestAddress = address
            generation = current
            slot = slots.slot(containing: address.frame)
            return slot?.checkedAddress(of: address.frame, write: true).map { $0 + address.offset }
        }
    }

    /// The retry loop: translates, without the lock, until no invalidation came between the look at their count and the
    /// moment at which the cache becomes valid under its lock. The race that this closes is that of a guest fault (Spec:
    /// generic 3.4), with the cache's lock in the place of mmu_lock. Kernel: `hva_to_pfn_retry`.
    ///
    /// Before the first look the cache is made invalid: its place is the new one already, its bytes are still the old
    /// ones', and nobody may take these for those. Caller holds `lock` for writing, as it is when this returns.
    private func establish(_ address: UserAddress, _ dropped: inout KernelMapping?) -> Bool {
        isValid = false
        while true {
            let snapshot = vm.frameCaches.snapshot()
            lock.unlockWrite()
            let found = candidate(address)
            lock.lockForWrite()
            guard let found else { return false }
            if !vm.frameCaches.isStale(snapshot, vm) {
                dropped = adopt(found)
                return true
            }
            lock.unlockWrite()
            found.refuse()
            vm.waitForNotifiers()
            lock.lockForWrite()
        }
    }

    /// Translates `address` for writing and maps its frame; nil: one of both failed. May sleep; `refreshLock` alone held.
    private func candidate(_ address: UserAddress) -> Candidate? {
        guard let held = vm.translateForCache(address) else { return nil }
        // The mapping of the page that was there before serves again.
        if held.frame == frame { return Candidate(held, nil) }
        guard let mapping = KernelMapping(held.frame, vm) else {
            held.release(.unused)
            return nil
        }
        return Candidate(held, mapping)
    }

    /// Makes the cache valid. The reference goes here, while the lock is held that an invalidation would need: nothing but
    /// the notifier keeps the memory from now on (I-24). The page is marked accessed, not dirty: who writes through the
    /// cache has the primary entry's right to write, and loses it before that entry is cleaned.
    /// Returns the mapping that is needed no more.
    private func adopt(_ found: consuming Candidate) -> KernelMapping? {
        isValid = true
        guard let fresh = found.accept() else { return nil }
        let old = mapping.take()
        mapping = consume fresh
        return old
    }
}

/// What one pass of a refresh has found: the frame, held, and its kernel mapping, but where the cache has that already.
private struct Candidate: ~Copyable {
    private let held: HeldFrame
    private let mapping: KernelMapping?

    init(_ held: consuming HeldFrame, _ mapping: consuming KernelMapping?) {
        self.held = held
        self.mapping = mapping
    }

    /// The pass counts. Kernel: `kvm_release_page_clean`.
    consuming func accept() -> KernelMapping? {
        held.release(.clean)
        return mapping
    }

    /// An invalidation came between. Kernel: `kvm_release_page_unused`.
    consuming func refuse() { held.releaseRefused() }
}

extension VirtualMachine {
    /// Waits until no invalidation runs: as long as one does, a refresh would only translate in vain. No spinning lock
    /// held. (Linux translates all the same, and gives the processor away in between.)
    fileprivate func waitForNotifiers() {
        spinUntil(frameCaches.invalidationIdentity.value) { activeInvalidations.load(ordering: .acquiring) == 0 }
    }
}
