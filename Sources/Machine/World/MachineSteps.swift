import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// A slot's file of private memory. It stays open to the world's end: a slot that is deleted and made again has it again.
struct PrivateFile {
    let slot: UInt16
    let file: GuestMemoryFile
}

/// A guest page that KVM has a frame cache of, active since its first use.
struct CachedPage {
    let page: GuestFrame
    let cache: FrameCache
}

extension Plan {
    /// Whether the architecture has what the plan's VM needs: private memory is the TDP MMU's alone, and steps on the
    /// guest's own page tables want shadow paging.
    public func fits(_ architecture: Architecture) -> Bool {
        (!hasPrivateMemory || architecture == .x86TDP) && (!changesGuestTables || architecture == .x86Shadow)
    }
}

/// Dirty rings, private memory, frame caches, faults ahead of use and asynchronous ones.
extension World {
    func performInMachine(_ action: Action) throws(Errno) -> StepOutcome {
        switch action {
        case .collectRing(let cpu): return .pages(try rings.collect(cpu, vm).map { $0.number })
        case .resetRings: return .value(try resetRings())
        case .setAttributes(let address, let size, let isPrivate):
            try vm.setMemoryAttributes(address: address.value, size: size, isPrivate ? .isPrivate : .none)
        case .punchPrivate(let address, let size): try punchPrivate(address, size)
        case .cacheStore(let address, let value):
            consumers?.writers.lockForRead()
            defer { consumers?.writers.unlockRead() }
            try cache(of: address).store(value, at: Int(address.offset))
        case .cacheLoad(let address):
            return .value(try cache(of: address).load(at: Int(address.offset)))
        case .fetchPage: if !vm.asyncFaults.runOne() { throw .EAGAIN }
        default: throw .EINVAL
        }
        return .done
    }

    /// The VMM copies what it has collected when the reset has returned, and not before. Spec: generic 5.6.
    private func resetRings() throws(Errno) -> UInt64 {
        let pages = rings.takeCollected()
        let count = try vm.resetDirtyRings()
        stepChecks.harvested(pages)
        return count
    }

    // MARK: Private memory

    /// The file of a slot that is made, which is made with it. Errors: those of KVM_CREATE_GUEST_MEMFD.
    func privateFile(of slot: SlotPlan) throws(Errno) -> GuestMemoryFile {
        let known = privateFiles.first { $0.slot == slot.id && $0.file.size >= slot.size }
        if let known { return known.file }
        let file = try vm.createGuestMemory(size: slot.size)
        privateFiles.append(PrivateFile(slot: slot.id, file: file))
        return file
    }

    /// ENOENT: no slot with a file shows the address. EINVAL: what `fallocate` says.
    private func punchPrivate(_ address: GuestAddress, _ size: UInt64) throws(Errno) {
        let found: (id: UInt16, offset: UInt64)? = vm.withSlots {
            guard let slot = vm.slot(containing: address.frame), slot.flags.guestMemory else { return nil }
            return (slot.id, address.value - slot.baseFrame.address.value)
        }
        guard let found, let known = privateFiles.last(where: { $0.slot == found.id }) else { throw .ENOENT }
        try known.file.allocate(.keepSizeAndPunchHole, offset: found.offset, length: size)
    }

    // MARK: KVM's own use of guest memory

    /// The page's cache, active from now on; whether the page is there the use of its bytes says. EINVAL: no such address.
    private func cache(of address: GuestAddress) throws(Errno) -> FrameCache {
        if let known = cachedPages.first(where: { $0.page == address.frame }) { return known.cache }
        let cache = FrameCache(vm)
        cachedPages.append(CachedPage(page: address.frame, cache: cache))
        do throws(Errno) {
            try cache.activate(address.frame.address, length: pageSize)
        } catch {
            // After EFAULT it is active, and its use refreshes it.
            guard error == .EFAULT else { throw error }
        }
        return cache
    }

    /// Only a vCPU's own task calls it.
    func preFault(_ actor: TaskPlan.Actor, _ address: GuestAddress, _ size: UInt64) throws(Errno) -> StepOutcome {
        guard case .virtualCPU(let number) = actor else { throw .EINVAL }
        return .value(try vm.preFault(vm.virtualCPUs[number], PreFaultRange(address: address, size: size)).size)
    }
}
