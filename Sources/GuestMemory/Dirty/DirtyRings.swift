import Audit
import Frames
import HostMemory
import Synchrony

/// How a VM logs writes. Kernel: `dirty_ring_size`, `dirty_ring_with_bitmap`.
public struct DirtyRings: Sendable, Equatable {
    /// Bytes of each vCPU's ring; 0: there are none, slots have bitmaps.
    public internal(set) var bytes: UInt64 = 0
    /// Slots have bitmaps beside the rings, for writes that no vCPU makes.
    public internal(set) var hasBackupBitmap = false
}

/// Which of the two capabilities turns rings on. They differ in what userspace must do about memory order, and so in where
/// they are offered.
public enum DirtyRingCapability: Sendable {
    /// Kernel: `KVM_CAP_DIRTY_LOG_RING`: only where the processor orders stores itself (x86).
    case totalStoreOrder
    /// Kernel: `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`.
    case acquireRelease
}

extension VirtualMachine {
    /// Whether vCPUs log into rings. Kernel: `kvm->dirty_ring_size != 0`.
    public var usesDirtyRings: Bool { dirtyRings.bytes != 0 }

    /// Whether slots with logging have bitmaps: always, but in a VM with rings alone. Whoever makes a bitmap asks.
    /// Kernel: `kvm_use_dirty_bitmap`. Caller holds slots_lock.
    public var usesDirtyBitmaps: Bool { !usesDirtyRings || dirtyRings.hasBackupBitmap }

    /// What KVM_CHECK_EXTENSION says of a ring capability: bytes of the largest ring, 0 for no rings. Spec: generic 3.8.
    public func largestDirtyRing(_ capability: DirtyRingCapability) -> UInt64 {
        let offered = capability == .acquireRelease || mmu.isTotalStoreOrder
        return offered && mmu.supportsDirtyRings ? DirtyRing.mostEntries * DirtyRingEntry.bytes : 0
    }

    /// Entries of a ring that count as full although they are empty: for what a vCPU still writes on its way out.
    private var reservedRingEntries: UInt32 { DirtyRing.reservedEntries + mmu.hardwareLogEntries }

    /// From now on each vCPU that is made gets a ring of `bytes`, which is cut to 32 bits. Takes slots_lock (Kernel:
    /// `kvm->lock`, which the model has not). EINVAL: not offered; no power of two; smaller than a page, or than what is
    /// reserved; enabled already; a vCPU exists. E2BIG: more than 65536 entries. Kernel:
    /// `kvm_vm_ioctl_enable_dirty_log_ring`. Spec: generic 5.6.
    public func enableDirtyRings(
        bytes: UInt64, _ capability: DirtyRingCapability = .acquireRelease
    ) throws(Errno) {
        let bytes = bytes & 0xffff_ffff
        guard largestDirtyRing(capability) != 0 else { throw .EINVAL }
        guard bytes != 0, bytes & (bytes - 1) == 0, bytes >= pageSize,
            bytes >= UInt64(reservedRingEntries) * DirtyRingEntry.bytes
        else { throw .EINVAL }
        guard bytes <= DirtyRing.mostEntries * DirtyRingEntry.bytes else { throw .E2BIG }
        slotsLock.lock()
        defer { slotsLock.unlock() }
        guard !usesDirtyRings, virtualCPUs.isEmpty else { throw .EINVAL }
        dirtyRings.bytes = bytes
    }

    /// Gives slots bitmaps beside the rings. Takes slots_lock. EINVAL: not offered on this architecture, no rings, or a
    /// slot exists. Kernel: `KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP`.
    public func enableBackupBitmap() throws(Errno) {
        guard mmu.offersBackupBitmap else { throw .EINVAL }
        slotsLock.lock()
        defer { slotsLock.unlock() }
        guard usesDirtyRings, activeSlots.isEmpty else { throw .EINVAL }
        dirtyRings.hasBackupBitmap = true
    }

    /// Adds a vCPU and makes its ring, if the VM has rings. Before any vCPU runs. ENOMEM: no memory for the ring.
    /// Kernel: `kvm_vm_ioctl_create_vcpu`.
    public func create(_ cpu: VirtualCPU) throws(Errno) {
        precondition(cpu.vm === self, "a vCPU belongs to another VM")
        if usesDirtyRings {
            guard let ring = DirtyRing(host: host, bytes: dirtyRings.bytes, reserved: reservedRingEntries) else {
                throw .ENOMEM
            }
            cpu.ring = ring
        }
        append(cpu)
    }

    /// Consumes what userspace has marked in every ring and protects those pages again; returns how many entries. The
    /// flush comes after slots_lock, before the count is told. Takes slots_lock. EINVAL: no rings. Kernel:
    /// `KVM_RESET_DIRTY_RINGS`. Spec: generic 5.6.
    ///
    /// As in 6.13 a signal does not end it; it ends by itself, since no more is consumed than was pushed.
    public func resetDirtyRings() throws(Errno) -> UInt64 {
        guard usesDirtyRings else { throw .EINVAL }
        mightSleep()
        var count: UInt64 = 0
        slotsLock.lock()
        for cpu in virtualCPUs {
            if let ring = cpu.ring {
                count += reset(ring)
                note(ring, .ringReset, cpu)
            }
        }
        slotsLock.unlock()
        if count > 0 { flushRemoteTLBs() }
        return count
    }

    /// Kernel: `kvm_dirty_ring_reset`. Caller holds slots_lock.
    private func reset(_ ring: DirtyRing) -> UInt64 {
        var count: UInt64 = 0
        var batch = RingBatch()
        while let entry = ring.takeReset() {
            count += 1
            if batch.absorb(entry) { continue }
            protect(batch)
            batch = RingBatch(entry)
        }
        protect(batch)
        return count
    }

    /// Protects the pages of a batch again. What userspace has scribbled is found out here: a batch of a slot that is not
    /// there, or that ends outside of it, is left out whole. Kernel: `kvm_reset_dirty_gfn`.
    private func protect(_ batch: RingBatch) {
        guard batch.mask != 0, isUserSlot(batch.slot), let slot = slot(numbered: batch.slot),
            batch.first < slot.pageCount
        else { return }
        guard UInt64(63 - batch.mask.leadingZeroBitCount) < slot.pageCount - batch.first else { return noteLogHole() }
        let first = GuestFrame(slot.baseFrame.number + batch.first)
        let guardian = lockMMU()
        mmu.protect(slot, first: first, mask: batch.mask, holding: guardian)
        record(Event(.dirtyCleared, guest: first.number, value: batch.mask, extra: UInt64(batch.slot)))
        guardian.unlock()
    }

    /// Whether a write to `frame` would be reported by the next harvest: the bit is set, or an entry stands in a ring. For
    /// checks at rest (Spec: I-12, X44).
    public func isInDirtyLog(_ frame: GuestFrame, of slot: MemorySlot) -> Bool {
        let offset = frame.number - slot.baseFrame.number
        if let bitmap = slot.dirtyBitmap, bitmap.contains(offset) { return true }
        for cpu in virtualCPUs {
            if let ring = cpu.ring, ring.holds(slot: slot.number, offset: offset) { return true }
        }
        return false
    }
}

extension VirtualCPU {
    /// Pages from the start of the vCPU's file to its ring. Kernel: `KVM_DIRTY_LOG_PAGE_OFFSET`.
    public static let dirtyRingPageOffset: UInt64 = 64

    /// Userspace maps the ring. EINVAL: privately, or for execution. Nil: the vCPU has none; the mapping succeeds, and an
    /// access to it is SIGBUS. Kernel: `kvm_vcpu_mmap`. Spec: generic 5.6.
    public final func mapDirtyRing(shared: Bool, executable: Bool) throws(Errno) -> DirtyRing? {
        guard let ring else { return nil }
        guard shared, !executable else { throw .EINVAL }
        return ring
    }
}

/// Pages of one slot within 64 frames, protected in one go. Spec: generic 5.6.
struct RingBatch {
    private(set) var slot: UInt32 = 0
    /// The offset of the mask's bit 0.
    private(set) var first: UInt64 = 0
    private(set) var mask: UInt64 = 0

    init() {}
    init(_ entry: DirtyRingEntry) {
        slot = entry.slot
        first = entry.offset
        mask = 1
    }

    /// Takes the entry in, if its page is within 64 of the others', before or behind them.
    mutating func absorb(_ entry: DirtyRingEntry) -> Bool {
        guard mask != 0, entry.slot == slot else { return false }
        let ahead = entry.offset &- first
        if ahead < 64 {
            mask |= 1 << ahead
            return true
        }
        // The window moves down as far as its topmost page allows.
        let back = first &- entry.offset
        guard back < 64, back <= UInt64(mask.leadingZeroBitCount) else { return false }
        mask = mask << back | 1
        first = entry.offset
        return true
    }
}
