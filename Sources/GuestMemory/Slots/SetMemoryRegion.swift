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
    /// With `flags.guestMemory`: the file of private memory, and where in it the slot begins, in bytes.
    public var guestMemory: GuestMemoryDescriptor
    public var guestMemoryOffset: UInt64
    public init(
        slot: UInt32, flags: SlotFlags = SlotFlags(), guestAddress: GuestAddress, size: UInt64,
        userAddress: UserAddress, guestMemory: GuestMemoryDescriptor = .closed, guestMemoryOffset: UInt64 = 0
    ) {
        self.slot = slot
        self.flags = flags
        self.guestAddress = guestAddress
        self.size = size
        self.userAddress = userAddress
        self.guestMemory = guestMemory
        self.guestMemoryOffset = guestMemoryOffset
    }
}

extension VirtualMachine {
    /// Slots that the user may have. Kernel: `KVM_USER_MEM_SLOTS`: 32767 less three internal ones.
    public static let userSlots: UInt32 = 32764
    /// Slots of one address space. Kernel: `KVM_MEM_SLOTS_NUM`.
    static let allSlots: UInt32 = 32767
    /// Kernel: `KVM_MEM_MAX_NR_PAGES`.
    static let largestSlotPages: UInt64 = (1 << 31) - 1

    /// Whether `number` can be a slot of the user's in one of the VM's address spaces.
    func isUserSlot(_ number: UInt32) -> Bool {
        number & 0xffff < Self.userSlots && number >> 16 < UInt32(slotSets.count)
    }

    /// Creates, deletes, moves a slot or changes its flags. Errors leave the visible slots unchanged.
    /// Takes slotsLock. Kernel: `KVM_SET_USER_MEMORY_REGION`. Spec: generic 4.4 (rows by number), 4.5.
    public func setMemoryRegion(_ region: MemoryRegion) throws(Errno) {
        mightSleep()
        guard region.slot & 0xffff < Self.userSlots else { throw .EINVAL }  // row 3
        slotsLock.lock()
        defer {
            slotsLock.unlock()
            runPostponedWork()
        }
        try changeSlots(region)
    }

    /// A slot of KVM's own, the same in every address space, whose memory the user can't change through slots; size 0
    /// deletes it. EINVAL: a number that is the user's, or too large. EEXIST: it is there already. The caller has mapped
    /// `region.userAddress`. Takes slotsLock. Kernel: `__x86_set_memory_region`. Spec: generic 4.4, last paragraph.
    public func setInternalRegion(_ region: MemoryRegion) throws(Errno) {
        mightSleep()
        guard (Self.userSlots..<Self.allSlots).contains(region.slot), region.flags == SlotFlags() else { throw .EINVAL }
        slotsLock.lock()
        defer { slotsLock.unlock() }
        let exists = slot(numbered: region.slot) != nil
        if region.size == 0, !exists { return }
        if region.size != 0, exists { throw .EEXIST }
        for space in slotSets.indices {
            var part = region
            part.slot |= UInt32(space) << 16
            try changeSlots(part)
        }
    }

    /// Caller holds slotsLock. Kernel: `kvm_set_memory_region`.
    private func changeSlots(_ region: MemoryRegion) throws(Errno) {
        try checkShape(region)
        let sets = slotSets[Int(region.slot >> 16)]
        let id = UInt16(truncatingIfNeeded: region.slot)
        let old = sets.active.slot(id: id)
        if region.size == 0 {
            guard let old else { throw .EINVAL }  // row 12
            guard slotPages >= old.pageCount else { throw .EIO }  // row 12b
            return try delete(old)
        }
        let pages = region.size >> pageShift
        let frames = region.guestAddress.frame..<(region.guestAddress + region.size).frame
        guard let old else {
            guard !slotPages.addingReportingOverflow(pages).overflow else { throw .EINVAL }  // row 13
            if sets.active.overlaps(frames, except: id) { throw .EEXIST }  // row 17
            return try create(region)
        }
        // Rows 14 and 14b. Linux 6.13 lets a request drop the flag and keeps the binding (I-25).
        if region.flags.guestMemory || old.flags.guestMemory { throw .EINVAL }
        if old.userAddress != region.userAddress || old.pageCount != pages
            || old.flags.readOnly != region.flags.readOnly
        {
            throw .EINVAL  // row 15
        }
        if old.baseFrame != region.guestAddress.frame {
            if sets.active.overlaps(frames, except: id) { throw .EEXIST }  // row 17
            return try move(old, to: region)
        }
        if old.flags != region.flags { try changeFlags(old, region.flags) }  // row 16
    }

    /// Deleting runs these checks too, so rubbish in the other fields fails a delete.
    private func checkShape(_ region: MemoryRegion) throws(Errno) {
        guard !region.flags.readOnly || mmu.allowsReadOnlySlots else { throw .EINVAL }  // row 4
        if region.flags.guestMemory {
            guard hasGuestMemory, !region.flags.logDirtyPages, !region.flags.readOnly else { throw .EINVAL }  // row 4
        }
        guard region.size & (pageSize - 1) == 0 else { throw .EINVAL }  // row 5
        guard region.guestAddress.offset == 0 else { throw .EINVAL }  // row 6
        let (end, wraps) = region.userAddress.value.addingReportingOverflow(region.size)
        guard region.userAddress.offset == 0, !wraps, end <= UserAddress.end.value else { throw .EINVAL }  // row 7
        if region.flags.guestMemory {
            let (_, wraps) = region.guestMemoryOffset.addingReportingOverflow(region.size)
            guard region.guestMemoryOffset & (pageSize - 1) == 0, !wraps else { throw .EINVAL }  // row 8
        }
        guard region.slot >> 16 < UInt32(slotSets.count), region.slot & 0xffff < Self.allSlots else {
            throw .EINVAL  // row 9
        }
        guard !region.guestAddress.value.addingReportingOverflow(region.size).overflow else { throw .EINVAL }  // row 10
        guard region.size >> pageShift <= Self.largestSlotPages else { throw .EINVAL }  // row 11
    }

    // MARK: The four changes. Spec: generic 4.5. Caller holds slotsLock.

    /// Memory for a slot's own object. Rows 18 and 20.
    private func allocateObject() throws(Errno) {
        guard memory.allowsObject() else { throw .ENOMEM }
    }

    /// The bitmap of a slot that is to be logged: the one that it has, or a new one; none in a VM that logs into rings
    /// alone. Row 21.
    private func bitmap(of old: MemorySlot?, _ flags: SlotFlags, pages: UInt64) throws(Errno) -> DirtyBitmap? {
        guard flags.logDirtyPages else { return nil }
        if let bitmap = old?.dirtyBitmap { return bitmap }
        guard usesDirtyBitmaps else { return nil }
        try allocateObject()
        return DirtyBitmap(pages: pages, initiallySet: manualProtect.initiallySet)
    }

    /// The new slot, bound to its file, as the MMU has prepared it. Rows 19, 21 and 22. Caller holds slotsArchLock.
    /// Kernel: `kvm_prepare_memory_region`.
    private func prepared(
        _ region: MemoryRegion, replacing old: MemorySlot?, keepsMetadata: Bool
    ) throws(Errno) -> MemorySlot {
        let pages = region.size >> pageShift
        let fits = keepsMetadata || pages <= mmu.mostSlotPages
        let new = MemorySlot(
            id: UInt16(truncatingIfNeeded: region.slot), addressSpace: UInt8(region.slot >> 16),
            baseFrame: region.guestAddress.frame, pageCount: pages, userAddress: region.userAddress,
            flags: region.flags, dirtyBitmap: fits ? try bitmap(of: old, region.flags, pages: pages) : nil,
            largePages: keepsMetadata ? old?.largePages : nil, extra: keepsMetadata ? old?.extra : nil,
            guestMemory: region.flags.guestMemory
                ? SlotGuestMemory(firstPage: region.guestMemoryOffset >> pageShift) : nil)
        if region.flags.guestMemory { try bind(new, to: region.guestMemory, offset: region.guestMemoryOffset) }
        do throws(Errno) {
            guard fits else { throw .ENOMEM }
            try mmu.prepare(new)
        } catch {
            unbind(new)
            throw error
        }
        return new
    }

    /// Runs `prepared` with slotsArchLock taken; on failure it is free again.
    private func lockAndPrepare(
        _ region: MemoryRegion, replacing old: MemorySlot?, keepsMetadata: Bool
    ) throws(Errno) -> MemorySlot {
        slotsArchLock.lock()
        do throws(Errno) {
            return try prepared(region, replacing: old, keepsMetadata: keepsMetadata)
        } catch {
            slotsArchLock.unlock()
            throw error
        }
    }

    private func create(_ region: MemoryRegion) throws(Errno) {
        try allocateObject()
        let new = try lockAndPrepare(region, replacing: nil, keepsMetadata: false)
        sets(of: new).inactive.replace(nil, by: new)
        swapSets(mirroring: nil, new)
        slotPages += new.pageCount
        if new.isLogged {
            loggingSlots.add(1, ordering: .relaxed)
            beginLogging(new, isNew: true)
        }
        record(Event(.slotCreated, guest: new.baseFrame.number, value: UInt64(new.id), extra: new.pageCount))
    }

    private func changeFlags(_ old: MemorySlot, _ flags: SlotFlags) throws(Errno) {
        try allocateObject()
        let region = MemoryRegion(
            slot: old.number, flags: flags, guestAddress: old.baseFrame.address, size: old.pageCount << pageShift,
            userAddress: old.userAddress)
        let new = try lockAndPrepare(region, replacing: old, keepsMetadata: true)
        sets(of: new).inactive.replace(old, by: new)
        swapSets(mirroring: old, new)
        record(Event(.slotFlags, guest: new.baseFrame.number, value: UInt64(new.id), extra: new.isLogged ? 1 : 0))
        if new.isLogged {
            loggingSlots.add(1, ordering: .relaxed)
            beginLogging(new, isNew: false)
        } else {
            loggingSlots.subtract(1, ordering: .relaxed)
            mmu.loggingDisabled(new)
        }
    }

    private func delete(_ old: MemorySlot) throws(Errno) {
        try allocateObject()
        let invalid = retire(old)
        sets(of: old).inactive.replace(invalid, by: nil)
        swapSets(mirroring: invalid, nil)
        slotPages -= old.pageCount
        unbind(old)
        if old.isLogged { loggingSlots.subtract(1, ordering: .relaxed) }
        record(Event(.slotDeleted, guest: old.baseFrame.number, value: UInt64(old.id)))
    }

    private func move(_ old: MemorySlot, to region: MemoryRegion) throws(Errno) {
        try allocateObject()
        try allocateObject()
        let invalid = retire(old)
        let new: MemorySlot
        do throws(Errno) {
            new = try prepared(region, replacing: old, keepsMetadata: false)
        } catch {
            // The old slot becomes valid again; its entries are gone and the generation has moved.
            sets(of: old).inactive.replace(invalid, by: old)
            swapSets(mirroring: invalid, old)
            throw error
        }
        sets(of: new).inactive.replace(invalid, by: new)
        swapSets(mirroring: invalid, new)
        loggingSlots.add((new.isLogged ? 1 : 0) - (old.isLogged ? 1 : 0), ordering: .relaxed)
        if new.isLogged { beginLogging(new, isNew: true) }
        record(Event(.slotMoved, guest: new.baseFrame.number, value: UInt64(new.id), extra: old.baseFrame.number))
    }

    /// Protects what is mapped through a slot that is logged from now on, unless its bitmap says that all is written.
    /// Spec: generic 5.2, 5.5.
    private func beginLogging(_ slot: MemorySlot, isNew: Bool) {
        guard !manualProtect.initiallySet else {
            if slot.dirtyBitmap == nil, !isNew { noteLogHole() }
            return
        }
        if isNew ? mmu.protectsNewSlots : !slot.flags.readOnly { mmu.loggingEnabled(slot) }
    }

    private func sets(of slot: MemorySlot) -> SlotSets { slotSets[Int(slot.addressSpace)] }

    /// Makes `old` INVALID in the visible set and removes its entries. The grace period of the swap comes before the
    /// removal: a handler that looked up the old slot has finished installing by then, and a later one sees INVALID.
    /// Returns the INVALID copy, with slotsArchLock held. Spec: generic 4.5, X16, I-21.
    private func retire(_ old: MemorySlot) -> MemorySlot {
        slotsArchLock.lock()
        let invalid = old.invalidCopy()
        sets(of: old).inactive.replace(old, by: invalid)
        swapSets(mirroring: old, invalid)
        mmu.flushSlot(old)
        slotsArchLock.lock()
        // An MMU may have given the copy what all slots get late; the old one may come back.
        old.extra = invalid.extra
        return invalid
    }

    /// Publishes the inactive set and repeats the edit in the other. Holds slotsLock, drops slotsArchLock.
    /// Kernel: `kvm_swap_active_memslots`. Spec: generic 4.2, 4.3, I-20.
    private func swapSets(mirroring old: MemorySlot?, _ new: MemorySlot?) {
        // A slot is added, replaced by one of its own number, or taken away.
        guard let changed = new ?? old else { return }
        let slots = sets(of: changed)
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
        let after = generation + UInt64(slotSets.count)
        mmu.slotsWillChange(to: after)
        next.generation.store(after, ordering: .releasing)
        slots.inactive.replace(old, by: new)
    }

    /// I-20, checked at rest: both sets of each address space hold the same slots, without overlap, in all indexes.
    public func slotSetsAgree() -> Bool {
        for sets in slotSets {
            let (a, b) = (sets.active, sets.inactive)
            guard a.isConsistent, b.isConsistent, a.count == b.count, a.generation.load(ordering: .relaxed) >> 63 == 0
            else { return false }
            for slot in a.byFrame.all where b.slot(id: slot.id) !== slot { return false }
        }
        return true
    }
}
