import Audit
import Frames
import HostMemory
import Synchronization
import Synchrony

/// The active frame caches of a VM, and how a refresh learns of invalidations. Kernel: `kvm->gpc_list`.
/// Spec: generic 2.14, 3.2.
final class FrameCaches: @unchecked Sendable {
    // Unchecked: `active` is touched only under `lock`.
    /// Kernel: `kvm->gpc_lock`.
    let lock = SpinLock(.frameCacheList)
    private var active: [FrameCache] = []
    /// As many as `active` has. An invalidation that reads 0 leaves the list alone: the cache that comes into it later
    /// sees, in its first refresh, that this invalidation runs or has ended.
    private let count = Atomic<Int>(0)
    private let identity = ObjectIdentity()
    /// Frames that caches have mapped into the kernel.
    let mappings = Atomic<Int>(0)

    /// Invalidations that have ended, whether they met a slot or not. Written under `mn_invalidate_lock`, before the count
    /// of running ones goes down.
    ///
    /// Linux looks at `mmu_invalidate_seq` instead, which moves only where a slot was met. A cache of memory that no slot
    /// shows can then miss a whole invalidation, from start to end, that falls into its refresh, and become valid for a
    /// page that is gone (gap G1). A count of its own, which always moves, closes that without making every guest fault
    /// of the VM try again. Spec: generic 2.14, I-6.
    private let ended = Atomic<UInt64>(0)
    /// Of `ended` and the count of running invalidations.
    let invalidationIdentity = ObjectIdentity()

    func add(_ cache: FrameCache) {
        lock.lock()
        active.append(cache)
        schedulingNote(.atomicAccumulate, identity.value)
        count.add(1, ordering: .sequentiallyConsistent)
        lock.unlock()
    }

    func remove(_ cache: FrameCache) {
        lock.lock()
        active.removeAll { $0 === cache }
        schedulingNote(.atomicAccumulate, identity.value)
        count.subtract(1, ordering: .sequentiallyConsistent)
        lock.unlock()
    }

    /// Every active cache. For checks at rest.
    var all: [FrameCache] {
        lock.lock()
        defer { lock.unlock() }
        return active
    }

    /// An invalidation ends. Caller holds `mn_invalidate_lock`.
    func noteEnd() {
        schedulingNote(.atomicAccumulate, invalidationIdentity.value)
        ended.add(1, ordering: .acquiringAndReleasing)
    }

    /// Makes the caches in `range` invalid and waits for whoever uses one. Before mmu_lock is taken, which may not be held
    /// together with a cache's lock. Does not sleep. Kernel: `gfn_to_pfn_cache_invalidate_start`.
    func invalidate(_ range: Range<UserAddress>) {
        schedulingNote(.atomicLoad, identity.value)
        guard count.load(ordering: .sequentiallyConsistent) > 0 else { return }
        lock.lock()
        for cache in active { cache.invalidate(range) }
        lock.unlock()
    }

    /// Before a translation. Spec: I-8.
    func snapshot() -> CacheSnapshot {
        schedulingPoint(.atomicLoad, invalidationIdentity.value)
        return CacheSnapshot(ended.load(ordering: .acquiring))
    }

    /// Whether an invalidation runs, or has ended since `snapshot`. The running ones first: whoever sees none also sees how
    /// many have ended. Not `mmu_invalidate_in_progress`, which goes up only after the caches were invalidated. Caller
    /// holds the cache's lock for writing. Kernel: `mmu_notifier_retry_cache`. Spec: generic 3.3.
    func isStale(_ snapshot: borrowing CacheSnapshot, _ vm: VirtualMachine) -> Bool {
        schedulingNote(.atomicLoad, invalidationIdentity.value)
        return vm.activeInvalidations.load(ordering: .sequentiallyConsistent) != 0
            || ended.load(ordering: .acquiring) != snapshot.ended
    }

    /// The VM goes: what is still active was forgotten by its owner. Spec: I-28.
    func removeAll(_ journal: Journal?) {
        for cache in all {
            journal?.add(Finding(.i28, "a frame cache is active though its VM is gone"))
            cache.deactivate()
        }
    }
}

/// The proof that a refresh looked at the count of invalidations before it translated. As `InvalidationSnapshot`.
struct CacheSnapshot: ~Copyable {
    fileprivate let ended: UInt64
    fileprivate init(_ ended: UInt64) { self.ended = ended }
}

extension FrameCache {
    /// Looks with the lock held for reading, as most invalidations do not hit; then again with it held for writing, for
    /// in between a refresh may have gone elsewhere.
    fileprivate func invalidate(_ range: Range<UserAddress>) {
        lock.lockForRead()
        let hit = isHit(range)
        lock.unlockRead()
        guard hit else { return }
        lock.lockForWrite()
        // The kernel mapping stays: to undo it may sleep, and the next refresh may want it again.
        if isHit(range) { isValid = false }
        lock.unlockWrite()
    }

    private func isHit(_ range: Range<UserAddress>) -> Bool {
        guard isValid, mapping != nil, let userAddress else { return false }
        return range.contains(userAddress)
    }
}

extension VirtualMachine {
    /// How many frames the VM's frame caches have mapped. For checks: none after the last was deactivated.
    public var cachedFrameCount: Int { frameCaches.mappings.load(ordering: .relaxed) }

    /// I-24 and I-6 at rest, with nothing in flight: a listed cache is active, and a valid one has the frame that the
    /// process maps for writing there now.
    public func checkFrameCaches(_ journal: Journal) {
        for cache in frameCaches.all {
            if !cache.isActive { journal.add(Finding(.i24, "a frame cache is in the list and not active")) }
            guard cache.isValid, let address = cache.userAddress else { continue }
            let primary = addressSpace.translate(address)
            if primary?.frame != cache.frame || primary?.writable != true {
                journal.add(
                    Finding(
                        .i6, "a frame cache is valid for memory that the process does not map", frame: cache.frame,
                        guest: cache.guestAddress?.frame))
            }
        }
    }
}
