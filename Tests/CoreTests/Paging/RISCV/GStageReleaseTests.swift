import Audit
import Frames
import GuestMemory
import HostMemory
import Paging
import Synchrony
import Testing

/// A driver that invalidates its own mapping while it serves a fault: the translation that follows is younger than
/// the snapshot that came before.
private final class RestlessDevice: DriverMapping, @unchecked Sendable {
    // Unchecked: one task.
    let frame: HostFrame
    var restless = true
    init(_ frame: HostFrame) {
        self.frame = frame
        super.init(name: "restless device", flags: .framesOfDevice)
        claim(frame..<frame.advanced(by: 1))
    }
    override func fault(_ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool) -> DriverFault {
        let result = space.insertFrame(frame, at: address, in: vma)
        guard restless, result == .inserted else { return result }
        unmapMappings(pages: 0..<1)
        return space.insertFrame(frame, at: address, in: vma)
    }
}

/// Runs a fault while an invalidation of the same page is in progress: after the VM heard its start.
private final class FaultInside: MMUNotifier, @unchecked Sendable {
    // Unchecked: one task.
    let guest: RISCVGuest
    var outcome: FaultOutcome?
    init(_ guest: RISCVGuest) { self.guest = guest }
    override func invalidateRangeStart(_ range: Range<UserAddress>, blockable: Bool) {
        outcome = guest.fault(0, .write)
    }
}

/// The releases of one kind in the journal, by page.
private func releases(_ guest: RISCVGuest) -> [(kind: ReleaseKind, underLock: Bool)] {
    guest.host.events(.released).filter { $0.holder == .guestFault }.map {
        (ReleaseKind(rawValue: UInt8(truncatingIfNeeded: $0.value & 0xff))!, $0.value & 0x100 != 0)
    }
}

@Suite struct RV5_ReleasedOnceUnderTheLock {
    @Test func `each way to end a fault puts the page once, with its marks under mmu_lock`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 2)
        try guest.space.store(at(0), 1)
        guest.fault(0, .read)  // writable: dirty
        guest.fault(0, .write)  // spurious: dirty, since the leaf is writable
        guest.fault(1, .read)  // zero page: clean
        #expect(releases(guest).map(\.kind) == [.dirty, .dirty, .clean])
        #expect(releases(guest).allSatisfy { $0.underLock })
        guest.expectSound()
        guest.end()
    }

    @Test func `the zero page keeps its flags`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 1)
        let before = guest.host.state(guest.host.host.zeroPage)
        guest.fault(0, .read)
        let after = guest.host.state(guest.host.host.zeroPage)
        #expect(after.flags == before.flags)
        #expect(!after.flags.isAccessed)
    }

    @Test func `a PFN mapping's pages are neither counted nor marked`() throws {
        for order in 0...2 {
            let guest = RISCVGuest()
            let buffer = try #require(GraphicsBuffer(guest.host.host, pages: 4, order: order))
            try guest.space.mapPages(0, 4, .driver(buffer))
            try guest.slot(0, 0, count: 4)
            let frames = (0..<4).map { buffer.frame(of: $0)! }
            let before = frames.map { guest.host.state($0) }
            for n in 0..<4 {
                #expect(guest.fault(UInt64(n), .write) == .fixed)
                #expect(guest.leaf(UInt64(n))?.writable == true)
            }
            #expect(frames.map { guest.host.state($0).referenceCount } == before.map(\.referenceCount))
            for frame in frames { #expect(!guest.host.state(frame).headFlags.isDirty(by: .kvm)) }
            #expect(releases(guest).isEmpty)
            guest.expectSound()
        }
    }

    /// Generic 10.3, the rows that differ, on an MMU without a software bit.
    @Test(arguments: PolicyKind.allCases)
    func `tail pages of a plain block are mapped by precise alone`(policy: PolicyKind) throws {
        let guest = RISCVGuest(policy: policy)
        let buffer = try #require(GraphicsBuffer(guest.host.host, pages: 4, order: 2))
        try guest.space.mapPages(0, 4, .driver(buffer))
        try guest.slot(0, 0, count: 4)
        #expect(guest.fault(0, .write) == .fixed)
        for n in 1..<4 { #expect(guest.fault(UInt64(n), .write) == (policy == .precise ? .fixed : .failed(.EFAULT))) }
        #expect(guest.host.journal.holdings.isEmpty)
    }

    @Test(arguments: PolicyKind.allCases)
    func `no policy touches a page when its entry goes, ages or is protected`(policy: PolicyKind) throws {
        let guest = RISCVGuest(policy: policy)
        try guest.anonymous(count: 4)
        for n in 0..<4 { guest.fault(UInt64(n), .write) }
        let marks = guest.host.journal.events.count
        #expect(guest.age(0..<4))
        try guest.slot(0, 0, count: 4, log: true)
        guest.unmap(0..<4)
        let touched = guest.host.journal.events[marks...].filter {
            [.markedAccessed, .markedDirty, .referenceTaken, .referenceDropped].contains($0.kind)
        }
        #expect(touched.isEmpty)
        #expect(guest.leaves.isEmpty)
    }
}

@Suite struct RV6_DirtyOnlyWithAWritableLeaf {
    @Test func `a page that is mapped read-only is not marked dirty`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 1, log: true)
        try guest.space.store(at(0), 1)
        guest.fault(0, .read)
        #expect(guest.leaf(0)?.writable == false)
        #expect(!guest.flags(0).isDirty(by: .kvm))
        #expect(guest.flags(0).isAccessed(by: .kvm))
        guest.fault(0, .write)
        #expect(guest.leaf(0)?.writable == true)
        #expect(guest.flags(0).isDirty(by: .kvm))
        guest.expectSound()
    }
}

/// Arches 9, R1 to R3, and I-6.
@Suite struct I6_RISCVRetry {
    @Test(arguments: [false, true])
    func `a translation younger than the snapshot is refused`(quirk: Bool) throws {
        let guest = RISCVGuest(quirks: GStageQuirks(retryMarksUsed: quirk), deviceFrames: 4)
        let frame = try #require(guest.memory.allocateDeviceFrames(1)).lowerBound
        let device = RestlessDevice(frame)
        try guest.space.mapPages(0, 1, .driver(device))
        try guest.slot(0, 0, count: 1)
        #expect(guest.fault(0, .write) == .retry)
        #expect(guest.leaves.isEmpty)
        #expect(guest.host.events(.retry).count == 1)
        device.restless = false
        #expect(guest.fault(0, .write) == .fixed)
        guest.expectSound()
        guest.end()
    }

    @Test(arguments: [false, true])
    func `during an invalidation a fault ends without entry and, in strict mode, without mark`(quirk: Bool) throws {
        let guest = RISCVGuest(quirks: GStageQuirks(retryMarksUsed: quirk))
        try guest.anonymous(count: 1)
        try guest.space.store(at(0), 1)
        let inside = FaultInside(guest)
        guest.space.register(inside)
        try guest.space.advise(at(0)..<at(1), .dontNeed)
        guest.space.unregister(inside)
        #expect(inside.outcome == .retry)
        #expect(guest.leaves.isEmpty)
        #expect(releases(guest).map(\.kind) == [quirk ? .dirty : .unused])
        let marks = guest.host.events(.markedDirty).filter { $0.holder == .guestFault }
        #expect(marks.isEmpty == !quirk)
        #expect(guest.fault(0, .write) == .fixed)
        guest.expectSound()
        guest.end()
    }

    /// A whole invalidation at each point of a fault at which no lock is held, one run for each.
    @Test func `an invalidation at any point leaves no stale leaf and no reference`() throws {
        var outcomes: [FaultOutcome] = []
        var point = 0
        while true {
            let guest = RISCVGuest()
            try guest.anonymous(count: 1)
            try guest.space.store(at(0), 1)
            let space = guest.space
            var injected = false
            let hook: (Int) -> Void = { number in
                guard number >= point, !injected, !LockRank.allCases.contains(where: isHeld) else { return }
                injected = true
                do { try space.advise(at(0)..<at(1), .dontNeed) } catch { Issue.record("\(error)") }
            }
            let run = withHook(hook) { guest.fault(0, .write) }
            if run.result == .retry {
                #expect(releases(guest).map(\.kind) == [.unused])
                #expect(guest.leaves.isEmpty)
            }
            guest.expectSound()
            outcomes.append(run.result)
            guest.end()
            if !injected { break }
            point += 1
        }
        #expect(outcomes.contains(.retry) && outcomes.contains(.fixed))
        #expect(outcomes.allSatisfy { $0 == .retry || $0 == .fixed })
    }
}
