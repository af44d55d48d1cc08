import Audit
import Frames
import Synchronization
import Synchrony

/// Everybody who maps one object or one driver's memory. Kernel: `address_space.i_mmap` and `i_mmap_rwsem`.
final class MappingList: @unchecked Sendable {
    // Unchecked: `areas` is touched only under `lock`.
    let lock = SleepingLock(.mapping)
    private var areas: [VMA] = []

    func add(_ vma: VMA) {
        lock.lock()
        addLocked(vma)
        lock.unlock()
    }

    func addLocked(_ vma: VMA) { areas.append(vma) }

    func remove(_ vma: VMA) {
        lock.lock()
        areas.removeAll { $0 === vma }
        lock.unlock()
    }

    func removeLocked(_ vma: VMA) { areas.removeAll { $0 === vma } }

    var isEmpty: Bool {
        lock.lock()
        defer { lock.unlock() }
        return areas.isEmpty
    }

    /// Removes every entry for `pages`, in every address space, each between its notifier's start and end.
    /// Kernel: `unmap_mapping_range`.
    func unmap(_ pages: Range<Int>, keepAnonymous: Bool) {
        forEach(pages) { space, _, range in space.zapNotified(range, keepAnonymous: keepAnonymous) }
    }

    /// Calls `body` with each area that shows some of `pages`, and where. The list's lock is held, and keeps the address
    /// spaces alive. Kernel: `vma_interval_tree_foreach`, `rmap_walk_file`.
    func forEach(_ pages: Range<Int>, _ body: (AddressSpace, VMA, Range<UserAddress>) -> Void) {
        lock.lock()
        defer { lock.unlock() }
        for vma in areas {
            let count = Int(vma.range.upperBound.page - vma.range.lowerBound.page)
            let shown = pages.clamped(to: vma.firstPage..<(vma.firstPage + count))
            guard !shown.isEmpty else { continue }
            let low = vma.range.lowerBound + UInt64(shown.lowerBound - vma.firstPage) * pageSize
            body(vma.space.takeUnretainedValue(), vma, low..<(low + UInt64(shown.count) * pageSize))
        }
    }

    func unmapAll() { unmap(0..<Int.max, keepAnonymous: false) }

    /// The first of `frames` that a special entry maps anywhere.
    func firstMapped(of frames: Range<HostFrame>) -> HostFrame? {
        var found: HostFrame?
        forEach(0..<Int.max) { space, _, range in
            if found == nil { found = space.firstSpecial(of: frames, in: range) }
        }
        return found
    }
}
