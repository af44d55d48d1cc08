import Audit
import Frames
import Synchronization
import Synchrony

/// One process's memory: VMAs, the primary page table, and who listens to its changes. Kernel: `struct mm_struct`.
///
/// Locks: `mmapLock` guards the VMAs; `pageTableLock` guards the entries; entries are also read without it, by the fast
/// walk. Page tables are freed only by `exit`, so such a walk never meets a freed table (the kernel needs RCU or
/// interrupts-off for that); whoever walks keeps the address space from exiting.
/// Read `Fault.swift` next.
public final class AddressSpace: @unchecked Sendable {
    // Unchecked: `vmas`, `nextIdentity` and `hasExited` change only with `mmapLock` held for write, `notifiers` and
    // `invalidations` under `notifierLock`.
    public let host: Host
    /// Kernel: `mmap_lock`.
    public let mmapLock = ReadWriteLock(.mmap, spinning: false)
    /// Kernel: `page_table_lock`. One for the whole space; the kernel splits it by table.
    let pageTableLock = SpinLock(.pageTable)
    /// Held odd by fork while it write-protects: the fast pin must not slip by. Kernel: `write_protect_seq`.
    let writeProtectSequence = SequenceCount()
    public let signals = SignalState()

    /// Sorted, without overlaps.
    var vmas: [VMA] = []
    var nextIdentity: UInt64 = 1
    var hasExited = false
    /// Index of the VMA found last.
    let lastFound = Atomic<Int>(0)
    /// The top table's frame number; 0 until the first entry is made. Kernel: `mm->pgd`.
    let root = Atomic<UInt64>(0)
    let rootIdentity = ObjectIdentity()
    /// Its memory was taken while it still ran: what is not there now will never be. Kernel: `MMF_UNSTABLE`.
    let isUnstable = Atomic<Bool>(false)
    /// A leaf of it may show the huge page of zeros.
    let usesHugeZero = Atomic<Bool>(false)
    /// Its place in the host's registry. Under the registry's lock.
    var number: UInt64 = 0
    /// Tasks that walk it on the host's behalf: it can't be dropped meanwhile.
    let visitors = Atomic<Int>(0)
    let visitorsIdentity = ObjectIdentity()

    let notifierLock = SpinLock(.notifierList)
    let notifierReaders = ReadSideSections(atomic: false)
    var notifiers: [MMUNotifier] = []
    /// Starts without their end yet.
    var invalidations = 0

    @inline(__always) var memory: PhysicalMemory { host.memory }

    public init(host: Host) {
        self.host = host
        host.enter(self)
    }

    /// A child of fork: the host learns of it when it is complete.
    init(childIn host: Host) { self.host = host }

    deinit {
        host.leave(self)
        tearDown()
    }

    // MARK: VMAs

    /// The VMA that contains `address`. `mmapLock` held. Kernel: `vma_lookup`.
    public func vmaLookup(_ address: UserAddress) -> VMAInfo? {
        precondition(isHeld(.mmap), "vma_lookup without mmap_lock")
        return find(address)?.info
    }

    func find(_ address: UserAddress) -> VMA? {
        // A copy of the array's reference: one access to the property, and none open while a VMA is looked at.
        let vmas = vmas
        let last = lastFound.load(ordering: .relaxed)
        if last < vmas.count, vmas[last].range.contains(address) { return vmas[last] }
        let index = firstIndex(endingAfter: address)
        guard index < vmas.count, vmas[index].range.lowerBound <= address else { return nil }
        lastFound.store(index, ordering: .relaxed)
        return vmas[index]
    }

    /// The first VMA that ends after `address`; `vmas.count` if none does. Kernel: `find_vma`.
    func firstIndex(endingAfter address: UserAddress) -> Int {
        var low = 0
        var high = vmas.count
        while low < high {
            let middle = (low + high) / 2
            if vmas[middle].range.upperBound <= address { low = middle + 1 } else { high = middle }
        }
        return low
    }

    func newIdentity() -> UInt64 {
        nextIdentity += 1
        return nextIdentity
    }

    /// Page-aligned, not empty, in user space.
    static func isUsable(_ range: Range<UserAddress>) -> Bool {
        range.lowerBound.offset == 0 && range.upperBound.offset == 0 && !range.isEmpty
            && range.upperBound <= UserAddress.end
    }

    /// The pages of `range` that lie in `other`.
    static func overlap(_ range: Range<UserAddress>, _ other: Range<UserAddress>) -> Range<UserAddress>? {
        let low = max(range.lowerBound, other.lowerBound)
        let high = min(range.upperBound, other.upperBound)
        return low < high ? low..<high : nil
    }
}
