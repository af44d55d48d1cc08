import Frames
import Synchronization
import Synchrony

/// What a driver's fault came to. Kernel: `vm_fault_t`.
public enum DriverFault: Sendable, Equatable {
    /// The entry stands, or may be made writable. Kernel: `VM_FAULT_NOPAGE`.
    case inserted
    /// Of `makeWritable`: the driver has widened the entry itself. Kernel: `VM_FAULT_NOPAGE` from `pfn_mkwrite`.
    case handled
    /// Kernel: `VM_FAULT_SIGBUS`.
    case busError
    /// Kernel: `VM_FAULT_OOM`.
    case outOfMemory
    /// The memory behind the page is broken. Kernel: `VM_FAULT_HWPOISON`.
    case poisoned
    /// Drop `mmapLock`, call `waitForRetry`, fault again. Kernel: `VM_FAULT_RETRY`.
    case retry
}

/// What a driver keeps calls from doing with its mappings.
public struct DriverRefusals: OptionSet, Sendable {
    public let rawValue: UInt8
    public init(rawValue: UInt8) { self.rawValue = rawValue }
    /// mremap can't make one longer. Kernel: `VM_DONTEXPAND`, and every PFN map.
    public static let growth = DriverRefusals(rawValue: 1)
    /// None can be split: EINVAL for a call on a part of one. Kernel: a `may_split` operation.
    public static let splits = DriverRefusals(rawValue: 2)
    /// A child by fork has none. Kernel: `VM_DONTCOPY`.
    public static let copies = DriverRefusals(rawValue: 4)
    /// None can be executed: EPERM. Kernel: a file of a mount without execution.
    public static let execution = DriverRefusals(rawValue: 8)
}

/// Memory that a device driver lets processes map, and how its faults are served: `vm_operations` together with the
/// list of VMAs that map it. Kernel: `struct vm_operations_struct`, the device file's `address_space`.
///
/// A driver claims its frames, overrides `fault` (or `mapped`, to fill everything at mmap) and inserts frames from there.
/// It takes frames away only after `unmapMappings`. It must outlive its mappings; the VMAs see to that by owning it.
/// What it must keep to, and what happens otherwise, is in `DriverContract.swift`.
open class DriverMapping: @unchecked Sendable {
    // What is not `open` is `final`: Embedded Swift 6.3 would leave stubs of it in several modules.
    // Unchecked: the base class's state is immutable or locked; subclasses answer for theirs.

    /// What findings call it.
    public final let name: StaticString
    /// What its VMAs are: `pfnMap`, `mixedMap` or, with counted pages alone, neither; `io`. The rest comes from the mmap
    /// call.
    public final let flags: VMAFlags
    /// Entries are born read-only, and `makeWritable` is asked at the first write. Kernel: a `pfn_mkwrite` operation.
    public final let wantsWriteNotification: Bool
    /// What its mappings don't take part in.
    public final let refusals: DriverRefusals
    final let mappings = MappingList()
    final let owned = OwnedFrames()
    /// See `toleratedEmptyAnswers`. It matters for broken drivers alone, and so passes no scheduling point.
    final let emptyAnswers = Atomic<Int>(0)
    /// What it answers to the next faults, in the place of what it would: how often, and what. Kernel: no counterpart.
    public final let forced = ForcedAnswers()

    public init(
        name: StaticString, flags: VMAFlags, wantsWriteNotification: Bool = false, refusals: DriverRefusals = .growth
    ) {
        precondition(!flags.pfnMap || !flags.mixedMap, "a driver's mapping is a PFN map or a mixed map")
        self.name = name
        self.flags = flags
        self.wantsWriteNotification = wantsWriteNotification
        self.refusals = refusals
    }

    /// Nothing is mapped at `address`. Called with `mmapLock` held for read, no spinning lock held. Inserts the frame
    /// by `space.insertFrame` or `insertPage` before it answers `.inserted`; may insert neighbours too.
    open func fault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault { .busError }

    /// No table stands yet for the 2 MiB around `address`, all of which lie in the VMA: the driver may insert a huge
    /// leaf. Nil: it doesn't; `fault` follows. Locks as for `fault`. Kernel: `huge_fault`.
    open func hugeFault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault? { nil }

    /// The first write to an entry that is present and read-only in a shared, writable mapping; `.inserted` lets it
    /// become writable. A driver that keeps account of what is clean widens the entry itself, under the lock of that
    /// account, and answers `.handled`. Locks as for `fault`. Kernel: `pfn_mkwrite`.
    open func makeWritable(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress
    ) -> DriverFault { .inserted }

    /// A VMA was made; entries may be inserted at once. `mmapLock` held for write. An error fails the mmap call.
    /// Kernel: the file's `mmap` operation.
    open func mapped(_ space: AddressSpace, _ vma: VMAInfo) -> Errno? { nil }

    /// Waits, without locks, until it's worth faulting again after `.retry`.
    open func waitForRetry() { yieldProcessor() }

    /// Removes every entry for `pages` of this memory in every address space; each notifier hears start before and end
    /// after. May sleep; `mmapLock` need not be held, nor must a lock ranked at or past `.mapping` be.
    /// The driver keeps new faults out by a lock of its own. Kernel: `unmap_mapping_range`.
    public final func unmapMappings(pages: Range<Int>) { mappings.unmap(pages, keepAnonymous: false) }

    /// Whether some address space maps this memory.
    public final var isMapped: Bool { !mappings.isEmpty }

    /// What the driver has claimed and not given back, ascending.
    public final var claimedFrames: [Range<HostFrame>] { owned.all }
}

extension VMAFlags {
    /// Kernel: `VM_PFNMAP | VM_IO`.
    public static var framesOfDevice: VMAFlags {
        var flags = VMAFlags()
        flags.pfnMap = true
        flags.io = true
        return flags
    }
    /// Kernel: `VM_PFNMAP`.
    public static var frames: VMAFlags {
        var flags = VMAFlags()
        flags.pfnMap = true
        return flags
    }
    /// Kernel: `VM_MIXEDMAP`.
    public static var mixed: VMAFlags {
        var flags = VMAFlags()
        flags.mixedMap = true
        return flags
    }
}
