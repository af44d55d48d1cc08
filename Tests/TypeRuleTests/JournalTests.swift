import Audit
import Frames
import Testing

@testable import GuestMemory
@testable import HostMemory

/// The other half of "exactly once": the compiler refuses a second release, the journal reports a missing one.
@Suite struct I1_DroppedUnreleased {
    @Test(arguments: Holder.allCases.filter(\.isKVM))
    func `a page reference that is dropped is put as unused, and reported`(_ holder: Holder) {
        let small = SmallMemory()
        var frame: HostFrame?
        do {
            let page = small.reference(holder: holder)
            frame = page.frame
            #expect(small.count(page.frame) == 2)
        }
        #expect(small.count(frame!) == 1)
        #expect(small.journal.findings.map(\.invariant).contains(.i1))
        #expect(small.events(.forgotten).map(\.frame) == [frame!.number])
        #expect(small.events(.released).map(\.value).allSatisfy { $0 & 0xff == UInt64(ReleaseKind.unused.rawValue) })
        #expect(small.journal.holdings == [])
        #expect(small.memory.inspect(frame!)?.flags.isDirty == false)
        #expect(small.memory.inspect(frame!)?.flags.isAccessed == false)
    }

    @Test func `a page reference that is released is not reported`() {
        let small = SmallMemory()
        small.reference(holder: .framePage).releaseUnused()
        small.reference(holder: .framePage).releaseClean(stabilisedBy: .exclusiveOwner)
        small.reference(holder: .framePage).releaseDirty(stabilisedBy: .exclusiveOwner)
        #expect(small.journal.findings == [])
        #expect(small.events(.forgotten) == [])
        #expect(small.events(.referenceDropped).count == 3)
        #expect(small.journal.holdings == [])
    }

    @Test func `a pin that is dropped is unpinned, and reported`() {
        let small = SmallMemory()
        var frame: HostFrame?
        do {
            let pin = small.pin(holder: .hostMap)
            frame = pin.frame
            #expect(small.count(pin.frame) == 1 + Int(PageFrame.pinBias))
        }
        #expect(small.count(frame!) == 1)
        #expect(small.journal.findings.map(\.invariant) == [.i1])
        #expect(small.events(.pinDropped).count == 1)
        #expect(small.events(.referenceDropped) == [])
        #expect(small.journal.holdings == [])
    }

    @Test func `a pin that is unpinned is not reported`() {
        let small = SmallMemory()
        small.pin(holder: .hostMap).unpin(dirty: true)
        #expect(small.journal.findings == [])
        #expect(small.journal.holdings == [])
    }

    @Test func `a fault's reference that is dropped is put as unused, and reported`() {
        let small = SmallMemory()
        var frame: HostFrame?
        do {
            let page = small.reference(holder: .guestFault)
            frame = page.frame
            let reference = FaultReference(page)
            let isOwned = reference.isOwned
            #expect(isOwned)
        }
        #expect(small.count(frame!) == 1)
        #expect(small.journal.findings.map(\.invariant) == [.i1])
        #expect(small.journal.holdings == [])
    }

    @Test func `a fault's reference that is released unused is not reported`() {
        let small = SmallMemory()
        FaultReference(small.reference(holder: .guestFault)).releaseUnused()
        #expect(small.journal.findings == [])
        #expect(small.journal.holdings == [])
    }

    @Test func `a guessed reference that is dropped is put and reported as well`() {
        let small = SmallMemory()
        let guess = Guess(memory: small.memory)
        let page = small.reference(holder: .guestFault)
        let frame = page.frame
        guess.forget(page)
        do { _ = FaultReference(guessed: GuessedReference(guess, frame)) }
        #expect(small.count(frame) == 1)
        #expect(small.journal.findings.map(\.invariant) == [.i1])
        #expect(small.events(.forgotten).map(\.holder) == [.heuristic])
        #expect(small.journal.holdings == [])
    }
}

/// The same for a whole fault, on a real address space.
@Suite struct I17_FaultsEnd {
    @Test(arguments: [PolicyKind.precise, .guess])
    func `a fault that is dropped puts its page, and is reported`(_ policy: PolicyKind) throws {
        let small = try SmallVM(policy: policy)
        let before = small.vm.memory.journal?.findings ?? []
        let owned = small.faultIn(GuestFrame(17)) { $0.ownsReference }
        #expect(owned == true)
        #expect(before == [])
        #expect(small.small.journal.findings.map(\.invariant) == [.i1])
        #expect(small.small.journal.holdings == [])
    }

    @Test(arguments: PolicyKind.allCases)
    func `a fault that ends under mmu_lock, or unused, leaves nothing`(_ policy: PolicyKind) throws {
        let small = try SmallVM(policy: policy)
        let ended: Void? = small.faultIn(GuestFrame(17)) { faulted in
            let guardian = small.vm.lockMMUForFault()
            faulted.finish(.used(dirty: true), holding: guardian)
        }
        #expect(ended != nil)
        let unused: Void? = small.faultIn(GuestFrame(18)) { $0.releaseUnused() }
        #expect(unused != nil)
        #expect(small.small.journal.findings.filter { $0.invariant == .i1 } == [])
        #expect(small.small.journal.holdings == [])
    }
}

/// The check is what the permit is worth.
@Suite struct I6_PermitsComeFromTheCheck {
    @Test func `a fault is permitted to map what was found`() throws {
        let small = try SmallVM()
        let agrees = small.faultIn(GuestFrame(17)) { faulted in
            let guardian = small.vm.lockMMUForFault()
            var agrees = false
            if let permit = guardian.check(faulted) {
                agrees = permit.frame == faulted.frame && permit.guestFrame == GuestFrame(17) && permit.writable
            }
            faulted.finish(.unused, holding: guardian)
            return agrees
        }
        #expect(agrees == true)
    }

    @Test func `no permit is given after an invalidation came between`() throws {
        let small = try SmallVM()
        let permitted = small.faultIn(GuestFrame(17)) { faulted in
            do { try small.discard(GuestFrame(17)) } catch { Issue.record(error) }
            let guardian = small.vm.lockMMUForFault()
            var permitted = false
            if let permit = guardian.check(faulted) { permitted = permit.writable }
            faulted.finish(.unused, holding: guardian)
            return permitted
        }
        #expect(permitted == false)
        #expect(small.small.journal.holdings == [])
    }

    @Test func `a fault does not end under another VM's lock`() async {
        let trap = await #expect(processExitsWith: .failure, observing: [\.standardErrorContent]) {
            let one = try SmallVM()
            let other = try SmallVM()
            one.faultIn(GuestFrame(17)) { faulted in
                let guardian = other.vm.lockMMU()
                faulted.finish(.unused, holding: guardian)
            }
        }
        expect(trap, says: "another VM's lock")
    }

    @Test func `a frame is not checked under another VM's lock`() async {
        let trap = await #expect(processExitsWith: .failure, observing: [\.standardErrorContent]) {
            let one = try SmallVM()
            let other = try SmallVM()
            one.faultIn(GuestFrame(17)) { faulted in
                let guardian = other.vm.lockMMU()
                if let permit = guardian.check(faulted) { _ = permit.frame }
                faulted.releaseUnused()
            }
        }
        expect(trap, says: "another VM's frame")
    }
}
