import Audit
import Frames
import Synchronization
import Synchrony

/// Who wants to hear of changes to an address space's page tables: a secondary MMU. Kernel: `mmu_notifier_ops`.
///
/// Callbacks may be called by any task, with `mmapLock`, a buffer's or a mapping's lock held, never with a spinning
/// lock. A start with `blockable == false` must not sleep. Spec: generic 3.1.
open class MMUNotifier: @unchecked Sendable {
    // Unchecked: the base class has no state; subclasses answer for theirs.
    public init() {}

    /// Before entries in `range` are removed, moved to another frame or lose rights. When it returns, nothing derived
    /// from them may be in use, and until the matching end nothing may be derived from what stands there now.
    open func invalidateRangeStart(_ range: Range<UserAddress>, blockable: Bool) {}
    /// After the change. Same range and flag as the start.
    open func invalidateRangeEnd(_ range: Range<UserAddress>, blockable: Bool) {}
    /// Clears the secondary MMU's accessed state, flushes, and says whether any was set.
    open func clearFlushYoung(_ range: Range<UserAddress>) -> Bool { false }
    /// As `clearFlushYoung`, without the need to flush.
    open func clearYoung(_ range: Range<UserAddress>) -> Bool { false }
    /// Whether the page at `address` was accessed; changes nothing.
    open func testYoung(_ address: UserAddress) -> Bool { false }
    /// The address space dies, or the notifier is unregistered: nothing may be mapped any more.
    open func release() {}
}
