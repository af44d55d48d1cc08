import Audit
import Frames
import HostMemory
import Synchrony
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

// Neighbours of a faulting entry in the shadow MMU.

/// How the neighbours are known: through eight entries of the guest's, or because they lie in one large page of it.
enum NeighbourKind: CaseIterable, Sendable {
    case indirect, direct

    /// The page that is touched; its neighbours are the aligned eight.
    var page: Int { self == .indirect ? 9 : 0x209 }
    var group: Range<Int> { page - 1..<page + 7 }

    /// A guest whose eight pages are there but for `absent`, and that has touched nothing yet.
    func guest(absent: Set<Int> = [], log: Bool = false, readOnly: Bool = false) throws -> PagedGuest {
        let guest = try PagedGuest(pages: 1024, log: log)
        try guest.identityMap()
        try guest.write(3, 1, 0x20_00e7)
        for page in group where !absent.contains(page) { try guest.space.store(at(page), 1) }
        if readOnly {
            try guest.vm.setMemoryRegion(
                MemoryRegion(slot: 0, guestAddress: GuestAddress(0), size: 0, userAddress: at(0)))
            try guest.setSlot(readOnly: true)
        }
        guest.test.memory.forgetAccessedAndDirty()
        return guest
    }

    func touch(_ guest: PagedGuest) -> PagedAccessResult { guest.cpus[0].access(.load, at: UInt64(page) << 12) }

    /// Guest frames of the group that are mapped, as tests count pages.
    func mapped(_ guest: PagedGuest) -> Set<Int> {
        var pages: Set<Int> = []
        guest.mmu.forEachLeaf {
            if group.contains(Int($0.guestFrame.number)) { pages.insert(Int($0.guestFrame.number)) }
        }
        return pages
    }
}

/// Entries behind the guest's own were looked up one by one in another way, with the same result.
@Suite struct Patch10_IndirectPrefetch {
    @Test func `neighbours come one at a time, and end with the first that is not there`() throws {
        let guest = try NeighbourKind.indirect.guest(absent: [12])
        let watch = MostHeld(guest.test.journal)
        guest.test.journal.observer = watch
        #expect(NeighbourKind.indirect.touch(guest) == .value(1))
        guest.test.journal.observer = nil
        #expect(NeighbourKind.indirect.mapped(guest) == [8, 9, 10, 11] && watch.most == 1)
        #expect(guest.test.journal.holdings.isEmpty)
    }

    @Test(arguments: NeighbourKind.allCases)
    func `in a slot that the guest may not write nothing comes along`(kind: NeighbourKind) throws {
        let guest = try kind.guest(readOnly: true)
        #expect(kind.touch(guest) == .value(1))
        #expect(kind.mapped(guest) == [kind.page])
        #expect(guest.test.events(.referenceTaken).allSatisfy { $0.holder != .prefetch })
    }

    /// How many references prefetch has held at once.
    private final class MostHeld: EventObserver {
        private unowned let journal: Journal
        private(set) var most = 0
        init(_ journal: Journal) { self.journal = journal }
        override func observe(_ event: Event) {
            guard event.kind == .referenceTaken, event.holder == .prefetch else { return }
            most = max(most, journal.holdings.filter { $0.holder == .prefetch }.reduce(0) { $0 + $1.references })
        }
    }
}

@Suite struct Patch38_PrefetchedIsAccessed {
    @Test func `pages that come along with a large page's are accessed, and dirty since patch 41`() throws {
        try checkPatch(38) {
            let kind = NeighbourKind.direct
            let guest = try kind.guest()
            #expect(kind.touch(guest) == .value(1) && kind.mapped(guest) == Set(kind.group))
            for page in kind.group {
                let flags = guest.test.state(try #require(guest.frame(page))).flags
                #expect(flags.isAccessed(by: .kvm) && flags.isDirty(by: .kvm), "page \(page)")
            }
            #expect(guest.test.journal.holdings.isEmpty)
        }
    }
}

/// Two functions became one; what each did alone it does now for both.
@Suite struct Patch39_OnePrefetch {
    @Test(arguments: NeighbourKind.allCases)
    func `both kinds come old and writable, are released dirty, and leave nothing held`(kind: NeighbourKind) throws {
        let guest = try kind.guest()
        #expect(kind.touch(guest) == .value(1) && kind.mapped(guest) == Set(kind.group))
        let released = guest.test.events(.released).filter { $0.holder == .prefetch }
        #expect(released.count == 7)
        #expect(released.allSatisfy { $0.value & 0xff == UInt64(ReleaseKind.dirty.rawValue) })
        guest.mmu.forEachLeaf { leaf in
            guard kind.group.contains(Int(leaf.guestFrame.number)) else { return }
            #expect(leaf.writable && leaf.accessed == (Int(leaf.guestFrame.number) == kind.page))
        }
        #expect(guest.test.journal.holdings.isEmpty)
    }

    @Test(arguments: NeighbourKind.allCases)
    func `neither kind maps a writable neighbour of a logged slot, or one while an invalidation runs elsewhere`(
        kind: NeighbourKind
    ) throws {
        let logged = try kind.guest(log: true)
        #expect(kind.touch(logged) == .value(1) && kind.mapped(logged) == [kind.page])
        let busy = try kind.guest()
        busy.vm.invalidateRangeStart(pages(100..<101), blockable: true)
        #expect(kind.touch(busy) == .value(1) && kind.mapped(busy) == [kind.page])
        busy.vm.invalidateRangeEnd(pages(100..<101))
    }
}
