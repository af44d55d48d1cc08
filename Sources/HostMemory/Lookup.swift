import Frames
import Synchronization
import Synchrony

/// What a get-user-pages caller asks for. Kernel: `FOLL_*`; `FOLL_GET` or `FOLL_PIN` follows from the call.
public struct LookupFlags: Sendable, Equatable {
    /// Kernel: `FOLL_WRITE`.
    public var write: Bool
    /// Kernel: `FOLL_NOWAIT`: give up instead of waiting for I/O.
    public var noWait: Bool
    /// Kernel: `FOLL_INTERRUPTIBLE`: any signal ends a wait, not only a fatal one.
    public var interruptible: Bool
    /// Kernel: `FOLL_HWPOISON`: tell a poisoned page apart from a fault.
    public var hardwarePoison: Bool
    /// Kernel: `FOLL_LONGTERM`: the pin may stay: a private mapping's page must be its own first.
    public var longTerm: Bool
    /// Kernel: `FOLL_HONOR_NUMA_FAULT`. Implicit for writes and for the fast walk.
    public var honorNUMA: Bool

    @inlinable public init(
        write: Bool = false, noWait: Bool = false, interruptible: Bool = false, hardwarePoison: Bool = false,
        longTerm: Bool = false, honorNUMA: Bool = false
    ) {
        self.write = write
        self.noWait = noWait
        self.interruptible = interruptible
        self.hardwarePoison = hardwarePoison
        self.longTerm = longTerm
        self.honorNUMA = honorNUMA
    }
}

/// Why get-user-pages gave no page. Spec: generic 1.9.
public enum GetUserPagesError: Error, Equatable, Sendable, CaseIterable {
    /// The kernel returns 0: with `noWait`, the fault would have had to wait.
    case wouldBlock
    /// -EINTR: a signal.
    case interrupted
    /// -EAGAIN: a fatal signal was pending at the first mmap-lock acquisition.
    case again
    /// -EHWPOISON: only with `hardwarePoison`.
    case hardwarePoison
    /// -EFAULT.
    case fault
    /// -ENOMEM.
    case noMemory
    /// -EEXIST: a special entry in an ordinary (mixed-map) VMA.
    case exists
    /// -EREMOTEIO: peer-to-peer DMA memory. No backing of this model is such memory.
    case remoteIO
}

/// An entry of a PFN map while the page-table lock is held. Kernel: `struct follow_pfnmap_args`.
public struct PFNMapping: Sendable, Equatable {
    /// The exact frame, also inside a huge leaf.
    public let frame: HostFrame
    /// The entry's hardware W bit.
    public let writable: Bool
    public let special: Bool
    /// A page frame stands behind it whose count is 0. Asked only by the defect `tailPageRefused`.
    public let isUncounted: Bool
}

/// What a simulated user fault came to. Kernel: `fixup_user_fault`.
public struct FixupResult: Sendable, Equatable {
    /// Nil: the fault was handled. Else EFAULT, ENOMEM or EINTR.
    public let error: Errno?
    /// `mmapLock` was dropped and taken again: every VMA looked up before is stale.
    public let unlocked: Bool
}

/// What the primary page table says of an address, for reports and tests.
public struct HostTranslation: Sendable, Equatable {
    public let frame: HostFrame
    public let writable: Bool
    public let accessed: Bool
    public let dirty: Bool
    public let special: Bool
    public let level: PageLevel
}

/// The signals of the process, as get-user-pages sees them. Kernel: `signal_pending`, `fatal_signal_pending`.
///
/// A signal that comes wakes whoever sleeps in `sleepers`; each then sees whether it is one that ends its sleep.
public final class SignalState: Sendable {
    private let bits = Atomic<UInt32>(0)
    private let identity = ObjectIdentity()
    /// Where tasks of the process sleep that a signal must reach.
    public let sleepers = SleepQueue()
    public init() {}

    /// Any signal is pending. The setter sends or handles a plain one.
    public var pending: Bool {
        get { load() != 0 }
        set { set(1, newValue) }
    }
    /// A fatal signal is pending; it is also a pending one.
    public var fatal: Bool {
        get { load() & 2 != 0 }
        set { set(2, newValue) }
    }
    private func load() -> UInt32 {
        schedulingNote(.atomicLoad, identity.value)
        return bits.load(ordering: .acquiring)
    }
    /// The signal first, then the wake-up (Kernel: `signal_wake_up`): a sleeper announces itself and looks.
    private func set(_ bit: UInt32, _ on: Bool) {
        schedulingPoint(.atomicUpdate, identity.value)
        guard on else {
            bits.bitwiseAnd(~bit, ordering: .releasing)
            return
        }
        bits.bitwiseOr(bit, ordering: .releasing)
        sleepers.wake()
    }
}
