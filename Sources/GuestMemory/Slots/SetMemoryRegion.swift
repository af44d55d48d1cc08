import Audit
import Frames
import HostMemory
import Synchronization
import Synchrony

/// A request to create, delete, move or change a slot. Kernel: `struct kvm_userspace_memory_region`.
public struct MemoryRegion: Sendable, Equatable {
    public var slot: UInt32
    public var flags: SlotFlags
    public var guestAddress: GuestAddress
    /// Bytes; 0 deletes the slot.
    public var size: UInt64
    public var userAddress: UserAddress
    public init(
        slot: UInt32, flags: SlotFlags = SlotFlags(), guestAddress: GuestAddress, size: UInt64,
        userAddress: UserAddress
    ) {
        self.slot = slot
        self.flags = flags
        self.guestAddress = guestAddress
        self.size = size
        self.userAddress = userAddress
    }
}

extension VirtualMachine {
    /// Slots that the user may have. Kernel: `KVM_USER_MEM_SLOTS`: 32767 less three internal ones.
    public static let userSlots: UInt32 = 32764
    /// Kernel: `KVM_MEM_MAX_NR_PAGES`.
    static let largestSlotPages: UInt64 = (1 << 31) - 1

    /// Creates, deletes, moves a slot or changes its flags. Errors leave the visible slots unchanged.
    /// Takes slotsLock. Kernel: `KVM_SET_USER_MEMORY_REGION`. Spec: generic 4.4 (rows by number), 4.5.
    public func setMemoryRegion(_ region: MemoryRegion) throws(Errno) {
        mightSleep()
        let id = try checkSlotNumber(region.slot)
        slotsLock.lock()
        defer { slotsLock.unlock() }
        try checkShape(region)
        let old = slots.active.slot(id: id)
        if region.size == 0 {
            guard let old else { throw .EINVAL }  // row 12
            return try delete(old)
        }
        let frames = region.guestAddress.frame..<(region.guestAddress + region.size).frame
        guard let old else {
            if slots.active.overlaps(frames, except: id) { throw .EEXIST }  // row 17
            return try create(id, region)
        }
        if old.userAddress != region.userAddress || old.pageCount != region.size >> pageShift
            || old.flags.readOnly != region.flags.readOnly
        {
            throw .EINVAL  // row 15
        }
        if old.baseFrame != region.guestAddress.frame {
            if slots.active.overlaps(frames, except: id) { throw .EEXIST }  // row 17
            return try move(old, to: region)
        }
        if old.flags != region.flags { try changeFlags(old, region.flags) }  // row 16
    }

    private func checkSlotNumber(_ slot: UInt32) throws(Errno) -> UInt16 {
        // Rows 3 and 9: the low half is the identity, the high half the address space, of which there is one.
        guard slot & 0xffff < Self.userSlots, slot >> 16 == 0 else { throw .EINVAL }
        return UInt16(slot)
    }

    private func checkShape(_ region: MemoryRegion) throws(Errno) {
        guard region.size & (pageSize - 1) == 0 else { throw .EINVAL }  // row 5
        guard region.guestAddress.offset == 0 else { throw .EINVAL }  // row 6
        let (end, wraps) = region.userAddress.value.addingReportingOverflow(region.size)
        guard region.userAddress.offset == 0, !wraps, end <= UserAddress.end.value else { throw .EINVAL }  // row 7
        guard !region.guestAddress.value.addingReportingOverflow(region.size).overflow else { throw .EINVAL }  // row 10
        guard region.size >> pageShift <= Self.largestSlotPages else { throw .EINVAL }  // row 11
    }

    // MARK: The four changes. Spec: generic 4.5. Caller holds slotsLock.

    /// Takes slotsArchLock and lets the MMU make the slot's metadata; without the lock if the MMU refuses.
    private func lockAndPrepare(_ new: MemorySlot) throws(Errno) {
        slotsArchLock.lock()
        do throws(Errno) {
            try mmu.prepare(new)
        } catch {
            slotsArchLock.unlock()
            throw error
        }
    }

    private func create(_ id: UInt16, _ region: MemoryRegion) throws(Errno) {
        let pages = region.size >> pageShift
        let new = MemorySlot(
            id: id, baseFrame: region.guestAddress.frame, pageCount: pages, userAddress: region.userAddress,
            flags: region.flags, dirtyBitmap: region.flags.logDirtyPages ? makeBitmap(pages) : nil)
        try lockAndPrepare(new)
        slots.inactive.replace(nil, by: new)
        swapSets(mirroring: nil, new)
        if new.isLogged {
            loggingSlots.add(1, ordering: .relaxed)
            if !manualProtect.initiallySet { mmu.loggingEnabled(new) }
        }
        record(Event(.slotCreated, guest: new.baseFrame.number, value: UInt64(id), extra: pages))
    }

    private func changeFlags(_ old: MemorySlot, _ flags: SlotFlags) throws(Errno) {
        let bitmap = flags.logDirtyPages ? old.dirtyBitmap ?? makeBitmap(old.pageCount) : nil
        let new = MemorySlot(
            id: old.id, baseFrame: old.baseFrame, pageCount: old.pageCount, userAddress: old.userAddress,
            flags: flags, dirtyBitmap: bitmap, largePages: old.largePages)
        try lockAndPrepare(new)
        slots.inactive.replace(old, by: new)
        swapSets(mirroring: old, new)
        record(Event(.slotFlags, guest: new.baseFrame.number, value: UInt64(new.id), extra: new.isLogged ? 1 : 0))
        if new.isLogged {
            loggingSlots.add(1, ordering: .relaxed)
            if !manualProtect.initiallySet, !new.flags.readOnly { mmu.loggingEnabled(new) }
        } else {
            loggingSlots.subtract(1, ordering: .relaxed)
            mmu.loggingDisabled(new)
        }
    }

    private func delete(_ old: MemorySlot) throws(Errno) {
        let invalid = retire(old)
        slots.inactive.replace(invalid, by: nil)
        swapSets(mirroring: invalid, nil)
        if old.isLogged { loggingSlots.subtract(1, ordering: .relaxed) }
        record(Event(.slotDeleted, guest: old.baseFrame.number, value: UInt64(old.id)))
    }

    private func move(_ old: MemorySlot, to region: MemoryRegion) throws(Errno) {
        let bitmap = region.flags.logDirtyPages ? old.dirtyBitmap ?? makeBitmap(old.pageCount) : nil
        let new = MemorySlot(
            id: old.id, baseFrame: region.guestAddress.frame, pageCount: old.pageCount, userAddress: old.userAddress,
            flags: region.flags, dirtyBitmap: bitmap)
        let invalid = retire(old)
        do throws(Errno) {
            try mmu.prepare(new)
        } catch {
            // The old slot becomes valid again; its entries are gone and the generation has moved.
            slots.inactive.replace(invalid, by: old)
            swapSets(mirroring: invalid, old)
            throw error
        }
        slots.inactive.replace(invalid, by: new)
        swapSets(mirroring: invalid, new)
        loggingSlots.add((new.isLogged ? 1 : 0) - (old.isLogged ? 1 : 0), ordering: .relaxed)
        if new.isLogged, !manualProtect.initiallySet { mmu.loggingEnabled(new) }
        record(Event(.slotMoved, guest: new.baseFrame.number, value: UInt64(new.id), extra: old.baseFrame.number))
    }

    /// Makes `old` INVALID in the visible set and removes its entries. The grace period of the swap comes before the
    /// removal: a handler that looked up the old slot has finished installing by then, and a later one sees INVALID.
    /// Returns the INVALID copy, with slotsArchLock held. Spec: generic 4.5, X16, I-21.
    private func retire(_ old: MemorySlot) -> MemorySlot {
        let invalid = old.invalidCopy()
        slotsArchLock.lock()
        slots.inactive.replace(old, by: invalid)
        swapSets(mirroring: old, invalid)
        mmu.flushSlot(old)
        slotsArchLock.lock()
        return invalid
    }

    /// Publishes the inactive set and repeats the edit in the other. Holds slotsLock, drops slotsArchLock.
    /// Kernel: `kvm_swap_active_memslots`. Spec: generic 4.2, 4.3, I-20.
    private func swapSets(mirroring old: MemorySlot?, _ new: MemorySlot?) {
        let generation = slots.active.generation.load(ordering: .relaxed)
        let next = slots.inactive
        next.generation.store(generation | 1 << 63, ordering: .releasing)
        // An invalidation that runs has looked up slots in the old set and must end with the same.
        while true {
            invalidateLock.lock()
            if activeInvalidations.load(ordering: .relaxed) == 0 { break }
            invalidateLock.unlock()
            invalidationsEnded.wait {
                // Counted under `invalidateLock`, which is not held here.
                activeInvalidations.load(ordering: .acquiring) == 0
            }
        }
        slots.publishInactive()
        invalidateLock.unlock()
        slotsArchLock.unlock()
        slotReaders.synchronize()
        next.generation.store(generation + 1, ordering: .releasing)
        slots.inactive.replace(old, by: new)
    }

    /// Nil in a VM that logs into rings alone.
    private func makeBitmap(_ pages: UInt64) -> DirtyBitmap? {
        usesDirtyBitmaps ? DirtyBitmap(pages: pages, initiallySet: manualProtect.initiallySet) : nil
    }

    /// I-20, checked at rest: both sets hold the same slots, without overlap, in all indexes.
    public func slotSetsAgree() -> Bool {
        let (a, b) = (slots.active, slots.inactive)
        guard a.byFrame.count == b.byFrame.count, a.byIdentity.count == a.byFrame.count,
            a.byAddress.count == a.byFrame.count, b.byIdentity.count == b.byFrame.count,
            b.byAddress.count == b.byFrame.count, a.generation.load(ordering: .relaxed) >> 63 == 0
        else { return false }
        for i in a.byFrame.indices {
            if a.byFrame[i] !== b.byFrame[i] || a.byIdentity[i] !== b.byIdentity[i] { return false }
            if i > 0, a.byFrame[i].baseFrame < a.byFrame[i - 1].frames.upperBound { return false }
        }
        return true
    }
}
