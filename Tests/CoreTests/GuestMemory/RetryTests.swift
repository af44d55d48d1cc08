import Audit
import Frames
import Machine
import Testing

@testable import GuestMemory
@testable import HostMemory

/// What the primary MMU does in an invalidation: start, change, end, one by one. Kernel: `zap_page_range_single`.
struct SteppedInvalidation {
    let space: AddressSpace
    let range: Range<UserAddress>
    init(_ space: AddressSpace, _ range: Range<Int>) {
        self.space = space
        self.range = pages(range)
    }
    func start() { space.notifyStart(range) }
    func change() {
        var gather = Gather()
        space.zap(range, &gather)
        gather.flush(space.host.memory)
    }
    func end() { space.notifyEnd(range) }
}

/// A fault by hand: snapshot, translate, lock and check, in the steps of generic 3.4.
private final class SteppedFault {
    let guest: TestGuest
    let page: Int
    private var snapshot: InvalidationSnapshot?
    private var faulted: FaultedFrame?
    /// The frame that the permit allows to map; nil if the check refused.
    private(set) var permitted: HostFrame?
    private(set) var translated: HostFrame?

    init(_ guest: TestGuest, _ page: Int) {
        self.guest = guest
        self.page = page
    }

    func snap() { snapshot = guest.vm.snapshot() }

    func translate() {
        guard let snapshot = snapshot.take() else { preconditionFailure("no snapshot") }
        let side = guest.vm.slotReaders.enter()
        defer { guest.vm.slotReaders.exit(side) }
        let slot = guest.vm.slot(containing: gfn(page))
        switch guest.vm.faultIn(gfn(page), slot: slot, write: true, snapshot: snapshot) {
        case .failed(let error, _): Issue.record("\(error)")
        case .frame(let found):
            translated = found.frame
            faulted = consume found
        }
    }

    /// Locks, checks and releases, as every MMU does; nothing is installed.
    func checkAndRelease() {
        guard let faulted = faulted.take() else { preconditionFailure("no frame") }
        let guardian = guest.vm.lockMMUForFault()
        permitted = check(faulted, holding: guardian)
        faulted.finish(permitted == nil ? .unused : .used(dirty: true), holding: guardian)
        guardian.unlock()
    }

    private func check(_ faulted: borrowing FaultedFrame, holding guardian: borrowing MMUGuard) -> HostFrame? {
        guard let permit = guardian.check(faulted) else { return nil }
        return permit.frame
    }
}

/// The retry check against every order of a fault's and an invalidation's three steps.
@Suite struct I6_NoStaleEntry {
    /// All orders of S < T < L (capitals) with s < p < e.
    static let orders: [String] = {
        var result: [String] = []
        for mask in 0..<64 where mask.nonzeroBitCount == 3 {
            var (fault, invalidation) = (Array("STL"), Array("spe"))
            result.append(
                String((0..<6).map { mask >> $0 & 1 == 1 ? fault.removeFirst() : invalidation.removeFirst() }))
        }
        return result
    }()

    private func run(_ order: String, _ guest: TestGuest, invalidating range: Range<Int>) throws -> SteppedFault {
        let fault = SteppedFault(guest, 0)
        let invalidation = SteppedInvalidation(guest.space, range)
        for step in order {
            switch step {
            case "S": fault.snap()
            case "T": fault.translate()
            case "L": fault.checkAndRelease()
            case "s": invalidation.start()
            case "p": invalidation.change()
            default: invalidation.end()
            }
            if step == "L", let frame = fault.permitted {
                #expect(frame == guest.frame(0), "\(order): the permit is for what the process maps now")
            }
        }
        #expect(guest.vm.invalidationsInProgress == 0 && guest.vm.activeNotifierCount == 0)
        return fault
    }

    @Test func `there are twenty orders`() { #expect(Set(Self.orders).count == 20) }

    @Test(arguments: orders, Architecture.twoStage)
    func `a frame is mapped only if the fault is over before the start or begins after the end`(
        order: String, architecture: Architecture
    ) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 2)
        try guest.space.store(at(0), 1)
        let fault = try run(order, guest, invalidating: 0..<1)
        let apart = order == "STLspe" || order == "speSTL"
        #expect((fault.permitted != nil) == apart)
        #expect(guest.test.events(.retry).count == (apart ? 0 : 1))
        if !apart, let frame = fault.translated {
            #expect(!guest.test.state(frame).flags.isAccessed(by: .kvm), "a refused page is released unused")
            #expect(!guest.test.state(frame).flags.isDirty(by: .kvm))
        }
    }

    @Test(arguments: orders, Architecture.twoStage)
    func `an invalidation elsewhere stops a ranged check only by its end, an unranged one by its being there`(
        order: String, architecture: Architecture
    ) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 2)
        try guest.space.store(at(0), 1)
        try guest.space.store(at(1), 1)
        let fault = try run(order, guest, invalidating: 1..<2)
        let at = Dictionary(uniqueKeysWithValues: order.enumerated().map { ($0.element, $0.offset) })
        let endBetween = at["S"]! < at["e"]! && at["e"]! < at["L"]!
        let runsAtCheck = at["s"]! < at["L"]! && at["L"]! < at["e"]!
        let refused = endBetween || (runsAtCheck && !ArchitectureSet.x86.contains(architecture))
        #expect((fault.permitted == nil) == refused)
    }

    @Test(arguments: Architecture.twoStage)
    func `an entry that was made before the start is gone when the start returns`(architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 3)
        for page in 0..<3 { guest.store(page, 1) }
        let invalidation = SteppedInvalidation(guest.space, 1..<2)
        invalidation.start()
        #expect(guest.leaf(1) == nil && guest.leaf(0) != nil && guest.leaf(2) != nil)
        invalidation.change()
        invalidation.end()
        #expect(guest.load(1) == .value(0))
        guest.check()
    }

    @Test(arguments: Architecture.twoStage)
    func `a fault that breaks copy-on-write itself tries again once and converges`(architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 1)
        try guest.space.store(at(0), 9)
        let child = try guest.space.fork()
        defer { child.exit() }
        #expect(guest.store(0, 10) == .stored)
        #expect(guest.test.events(.retry).count <= 1)
        #expect(guest.vm.statistics.pf_taken.load(ordering: .relaxed) <= 2)
        #expect(try child.load(at(0)) == 9 && guest.space.load(at(0)) == 10)
        guest.check()
    }

    /// The same by whole system calls, at every point of a real fault at which another thread could run.
    @Test(arguments: Architecture.twoStage, HostAction.allCases)
    func `whatever the host does at whatever point of a fault, the guest sees its memory`(
        architecture: Architecture, action: HostAction
    ) throws {
        for write in [false, true] {
            var point = 0
            while true {
                let guest = TestGuest(architecture)
                try guest.addMemory(0, 2, log: true)
                try guest.space.store(at(0), 7)
                var children: [AddressSpace] = []
                defer { for child in children { child.exit() } }
                let interposer = Interposer(point) {
                    #expect(throws: Never.self) { try action.perform(guest, &children) }
                }
                interposer.mayFire = { !guest.cpus[0].isInGuest }
                let result = interposer.run { write ? guest.store(0, 8) : guest.load(0) }
                guard interposer.hasFired else { break }
                let value = try guest.space.load(at(0))
                switch (result, action, write) {
                case (.stored, .dontNeed, true), (.stored, .remap, true): #expect(value == 8 || value == 0)
                case (.stored, _, true): #expect(value == 8)
                case (.value(let seen), .dontNeed, false), (.value(let seen), .remap, false):
                    #expect(seen == 7 || seen == 0)
                case (.value(let seen), _, false): #expect(seen == 7)
                // The process may no longer write, so the guest may not.
                case (.failed(.EFAULT), .readOnly, true): #expect(value == 7)
                default: Issue.record("\(result) at point \(point)")
                }
                guest.check()
                point += 1
            }
            #expect(point > 8)
        }
    }
}

/// What another thread of the process may do to page 0.
enum HostAction: CaseIterable, Sendable {
    case dontNeed, fork, readOnly, remap, harvest, numaHint

    func perform(_ guest: TestGuest, _ children: inout [AddressSpace]) throws {
        let page = pages(0..<1)
        switch self {
        case .dontNeed: try guest.space.advise(page, .dontNeed)
        case .fork: children.append(try guest.space.fork())
        case .readOnly: try guest.space.protect(page, .read)
        case .remap:
            try guest.space.unmap(page)
            try guest.space.mapPages(0, 1)
        case .harvest: _ = try guest.vm.getDirtyLog(slot: 0)
        case .numaHint: guest.space.hintNUMA(page)
        }
    }
}

/// I-8: the snapshot comes first, in the order of the events.
@Suite struct I8_SnapshotBeforeTranslation {
    @Test(arguments: Architecture.twoStage)
    func `every translation of a fault has a snapshot between the fault and itself`(architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 4)
        let child = try guest.space.fork()
        defer { child.exit() }
        for page in 0..<4 {
            _ = guest.load(page)
            guest.store(page, 1)
        }
        var fresh = false
        var translations = 0
        for event in guest.test.journal.events {
            switch event.kind {
            case .fault: fresh = false
            case .snapshot: fresh = true
            case .translated:
                translations += 1
                #expect(fresh)
            default: break
            }
        }
        #expect(translations >= 8)
    }

    @Test func `the snapshot that comes back is the one that was given`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 1)
        try guest.setSlot(pages: 2)
        let sequence = guest.vm.snapshot().sequence
        let snapshot = guest.vm.snapshot()
        try guest.space.advise(pages(0..<1), .dontNeed)
        let slot = guest.vm.slot(containing: gfn(1))
        switch guest.vm.faultIn(gfn(1), slot: slot, write: false, snapshot: snapshot) {
        case .failed(_, let back):
            let seen = back.sequence
            let stale = guest.vm.mayBeStale(back, gfn(1))
            #expect(seen == sequence && stale)
        case .frame(let faulted):
            faulted.releaseUnused()
            Issue.record("a hole was translated")
        }
    }
}

/// X12, X14: nothing is installed for a frame whose invalidation runs; prefetch waits for all of them.
@Suite struct X14_Prefetch {
    private func mayPrefetch(_ guest: TestGuest) -> Bool {
        let guardian = guest.vm.lockMMU()
        let may = mayPrefetch(holding: guardian)
        guardian.unlock()
        return may
    }

    private func mayPrefetch(holding guardian: borrowing MMUGuard) -> Bool {
        guard let permit = guardian.prefetchPermit() else { return false }
        _ = consume permit
        return true
    }

    @Test func `a prefetch permit is refused while any invalidation that hit a slot runs`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 2)
        try guest.space.mapPages(5, 1)
        #expect(mayPrefetch(guest))
        let inside = SteppedInvalidation(guest.space, 1..<2)
        inside.start()
        #expect(!mayPrefetch(guest))
        inside.end()
        #expect(mayPrefetch(guest), "unlike a fault, it has no snapshot that has grown old")
        let outside = SteppedInvalidation(guest.space, 5..<6)
        outside.start()
        #expect(mayPrefetch(guest))
        outside.end()
    }

    private func prefetch(_ guest: TestGuest, holding guardian: borrowing MMUGuard) -> (count: Int, permits: Int) {
        var permits = 0
        guard let permit = guardian.prefetchPermit() else { return (0, 0) }
        let slot = guest.vm.slot(containing: gfn(1))
        let count = guest.vm.prefetchPages(gfn(1), slot: slot, count: 1) { index, page in
            #expect(index == 0)
            let frame = page.frame
            let install = permit.permit(for: page, at: gfn(1))
            if install.frame == frame, install.guestFrame == gfn(1), install.writable { permits += 1 }
            page.releaseDirty(stabilisedBy: .mmuLock)
        }
        return (count, permits)
    }

    @Test func `a prefetched page is mapped for write under its own guest frame`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 2)
        try guest.space.store(at(1), 1)
        let guardian = guest.vm.lockMMU()
        let (count, seen) = prefetch(guest, holding: guardian)
        guardian.unlock()
        #expect(count == 1 && seen == 1)
        #expect(guest.test.state(try #require(guest.frame(1))).flags.isDirty(by: .kvm))
    }
}

extension VirtualCPU {
    var isInGuest: Bool { mode.load(ordering: .relaxed) == Mode.inGuest.rawValue }
}
