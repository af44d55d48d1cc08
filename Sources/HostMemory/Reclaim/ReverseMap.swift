import Audit
import Frames
import Synchronization
import Synchrony

/// From a page to the entries that map it. Kernel: `rmap_walk`.
///
/// An anonymous page knows its place in the mapping that it was made for (`word0`), and every area that may show it shows
/// it there: by fork, split, merge and move an area keeps its places. The kernel links those areas by `anon_vma`; here all
/// areas of all address spaces are asked that may hold private pages. An object's page is found through the list of the
/// areas that map the object.
extension Host {
    /// Calls `body` with each area that may map the anonymous page, and where. `mmapLock` of its space is held for read
    /// meanwhile. An address space that is forked during the walk is visited, since it enters the registry after its parent
    /// and before its parent's lock is given up. False from `body` ends the walk. No lock held.
    func forEachArea(
        anonymous page: UnsafeMutablePointer<PageFrame>, _ body: (AddressSpace, VMA, UserAddress) -> Bool
    ) {
        let place = memory.place(of: page)
        forEachSpace { space in
            space.mmapLock.lockForRead()
            defer { space.mmapLock.unlockRead() }
            for vma in space.vmas where vma.mayHoldAnonymous {
                if let address = vma.address(of: place), !body(space, vma, address) { return false }
            }
            return true
        }
    }

    /// Visits the address spaces one after the other, also those that come meanwhile; none can be dropped during its visit
    /// (it may exit).
    func forEachSpace(_ body: (AddressSpace) -> Bool) {
        var reached: UInt64 = 0
        while let space = holdSpace(after: reached) {
            reached = space._withUnsafeGuaranteedRef { $0.number }
            let goesOn = space._withUnsafeGuaranteedRef { body($0) }
            space._withUnsafeGuaranteedRef { space in
                schedulingPoint(.atomicAccumulate, space.visitorsIdentity.value)
                space.visitors.subtract(1, ordering: .releasing)
            }
            if !goesOn { return }
        }
    }

    private func holdSpace(after number: UInt64) -> Unmanaged<AddressSpace>? {
        registry.lock()
        defer { registry.unlock() }
        for space in spaces {
            let found = space._withUnsafeGuaranteedRef { space in
                guard space.number > number else { return false }
                space.visitors.add(1, ordering: .relaxed)
                return true
            }
            if found { return space }
        }
        return nil
    }

    /// Lists a space behind all others.
    func enter(_ space: AddressSpace) {
        registry.lock()
        spacesEntered += 1
        space.number = spacesEntered
        spaces.append(Unmanaged.passUnretained(space))
        registry.unlock()
    }

    /// Unlists a space, and waits until nobody visits it.
    func leave(_ space: AddressSpace) {
        registry.lock()
        spaces.removeAll { $0.toOpaque() == Unmanaged.passUnretained(space).toOpaque() }
        let isVisited = space.visitors.load(ordering: .acquiring) != 0
        registry.unlock()
        guard isVisited else { return }
        spinUntil(space.visitorsIdentity.value) { space.visitors.load(ordering: .acquiring) == 0 }
    }
}

extension PhysicalMemory {
    /// Where an anonymous page is in the mapping that it was made for; a large folio's head says it for all.
    func place(of page: UnsafeMutablePointer<PageFrame>) -> Int {
        Int(head(of: page).pointee.word0) + Int(page.pointee.headDistance.load(ordering: .relaxed))
    }
}

extension VMA {
    /// Where the area shows the page at `place` of its backing. Nil: nowhere.
    func address(of place: Int) -> UserAddress? {
        let distance = place - firstPage
        let count = Int(range.upperBound.page - range.lowerBound.page)
        guard distance >= 0, distance < count else { return nil }
        return range.lowerBound + UInt64(distance) * pageSize
    }
}
