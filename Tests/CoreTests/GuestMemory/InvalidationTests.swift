import Audit
import Foundation
import Frames
import Machine
import Testing

@testable import GuestMemory
@testable import HostMemory

/// I-9: invalidations in progress are those started and not ended; ranges are hulls.
@Suite struct I9_InvalidationsAreCounted {
    private func hull(_ guest: TestGuest) -> Range<UInt64>? {
        let start = guest.vm.invalidateStart.load(ordering: .relaxed)
        return start == .max ? nil : start..<guest.vm.invalidateEnd.load(ordering: .relaxed)
    }
    private func frames(_ range: Range<Int>) -> Range<UInt64> {
        gfn(range.lowerBound).number..<gfn(range.upperBound).number
    }
    private func sequence(_ guest: TestGuest) -> UInt64 { guest.vm.invalidateSequence.load(ordering: .relaxed) }

    @Test func `one invalidation raises the count, and its end moves the sequence`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 8)
        let before = sequence(guest)
        let invalidation = SteppedInvalidation(guest.space, 2..<4)
        invalidation.start()
        #expect(guest.vm.invalidationsInProgress == 1 && guest.vm.activeNotifierCount == 1)
        #expect(hull(guest) == frames(2..<4) && sequence(guest) == before)
        invalidation.end()
        #expect(guest.vm.invalidationsInProgress == 0 && guest.vm.activeNotifierCount == 0)
        #expect(sequence(guest) == before + 1)
    }

    @Test func `one that hits no slot is counted as running but moves nothing`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 2)
        try guest.space.mapPages(10, 2)
        let before = sequence(guest)
        let invalidation = SteppedInvalidation(guest.space, 10..<12)
        invalidation.start()
        #expect(guest.vm.invalidationsInProgress == 0 && guest.vm.activeNotifierCount == 1)
        invalidation.end()
        #expect(guest.vm.activeNotifierCount == 0 && sequence(guest) == before)
    }

    @Test func `ranges that overlap or nest widen the hull, which shrinks only when all have ended`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 16)
        let (a, b, c) = (
            SteppedInvalidation(guest.space, 4..<6), SteppedInvalidation(guest.space, 10..<12),
            SteppedInvalidation(guest.space, 5..<7)
        )
        a.start()
        b.start()
        #expect(hull(guest) == frames(4..<12) && guest.vm.invalidationsInProgress == 2)
        a.end()
        #expect(hull(guest) == frames(4..<12) && guest.vm.invalidationsInProgress == 1)
        c.start()
        #expect(hull(guest) == frames(4..<12) && guest.vm.invalidationsInProgress == 2)
        b.end()
        c.end()
        #expect(guest.vm.invalidationsInProgress == 0)
        c.start()
        #expect(hull(guest) == frames(5..<7), "the first after a pause starts anew")
        c.end()
    }

    @Test func `a range is clipped to the slots it hits, and covers all of them`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 40)
        try guest.setSlot(0, guest: 0, pages: 4, host: 0)
        try guest.setSlot(1, guest: 100, pages: 4, host: 8)
        try guest.setSlot(2, guest: 50, pages: 4, host: 2)
        let wide = SteppedInvalidation(guest.space, 1..<10)
        wide.start()
        // Slot 0 shows 1..<4, slot 1 shows 8..<10 at 100, slot 2 shows 2..<6 at 50.
        #expect(hull(guest) == frames(1..<102) && guest.vm.invalidationsInProgress == 1)
        wide.end()
        let narrow = SteppedInvalidation(guest.space, 5..<6)
        narrow.start()
        #expect(hull(guest) == frames(53..<54), "only slot 2 shows that page")
        narrow.end()
    }

    @Test func `part of a page counts as the page`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 4)
        guest.space.notifyStart(at(1, 100)..<at(2, 1))
        #expect(hull(guest) == frames(1..<3))
        guest.space.notifyEnd(at(1, 100)..<at(2, 1))
        #expect(guest.vm.invalidationsInProgress == 0)
    }

    @Test(arguments: [UInt64(1), 7, 1234])
    func `random starts and ends keep the books`(seed: UInt64) throws {
        let guest = TestGuest()
        try guest.addMemory(0, 24)
        try guest.space.mapPages(24, 8)
        var random = TestRandom(seed: seed)
        var open: [(SteppedInvalidation, hits: Bool)] = []
        var covered: Range<UInt64>?
        for _ in 0..<400 {
            if open.isEmpty || (open.count < 6 && Bool.random(using: &random)) {
                let first = Int.random(in: 0..<31, using: &random)
                let range = first..<Int.random(in: (first + 1)...32, using: &random)
                let invalidation = SteppedInvalidation(guest.space, range)
                let hit = range.clamped(to: 0..<24)
                if !hit.isEmpty {
                    let now = frames(hit)
                    let idle = !open.contains { $0.hits }
                    covered =
                        idle
                        ? now
                        : min(covered!.lowerBound, now.lowerBound)..<max(covered!.upperBound, now.upperBound)
                }
                invalidation.start()
                open.append((invalidation, !hit.isEmpty))
            } else {
                open.remove(at: Int.random(in: open.indices, using: &random)).0.end()
            }
            let running = open.filter { $0.hits }.count
            #expect(guest.vm.invalidationsInProgress == running, "seed \(seed)")
            #expect(guest.vm.activeNotifierCount == open.count, "seed \(seed)")
            if running > 0 { #expect(hull(guest) == covered, "seed \(seed)") }
        }
        for (invalidation, _) in open { invalidation.end() }
    }

    @Test(arguments: ["create", "delete", "move", "flags"])
    func `slots can't change while an invalidation runs`(change: String) throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 8)
        try guest.setSlot(0, pages: 2)
        let invalidation = SteppedInvalidation(guest.space, 0..<1)
        invalidation.start()
        let generation = guest.vm.slotsGeneration
        let done = Flag()
        let vm = guest.vm
        let region =
            switch change {
            case "create": guest.region(1, guest: 4, pages: 2)
            case "delete": MemoryRegion(slot: 0, guestAddress: GuestAddress(0), size: 0, userAddress: at(0))
            case "move": guest.region(0, guest: 64, pages: 2, host: 0)
            default: guest.region(0, pages: 2, log: true)
            }
        let thread = Thread {
            #expect(throws: Never.self) { try vm.setMemoryRegion(region) }
            done.raise()
        }
        thread.start()
        Thread.sleep(forTimeInterval: 0.05)
        #expect(!done.isRaised)
        #expect(vm.slotsGeneration == generation && vm.activeSlots.count == 1)
        invalidation.end()
        while !done.isRaised { Thread.sleep(forTimeInterval: 0.001) }
        #expect(vm.slotsGeneration > generation && vm.slotSetsAgree())
        guest.check()
    }
}

/// The other callbacks of the notifier.
@Suite struct G3_2_Callbacks {
    @Test(arguments: Architecture.twoStage)
    func `ageing asks and clears without touching the counters, and asks for one page only`(
        architecture: Architecture
    ) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 4)
        for page in 0..<4 { guest.store(page, 1) }
        let sequence = guest.vm.invalidateSequence.load(ordering: .relaxed)
        #expect(guest.space.testYoung(at(0)) && guest.space.testYoung(at(0)))
        #expect(guest.space.clearYoung(pages(0..<2)))
        #expect(!guest.space.testYoung(at(0)) && !guest.space.testYoung(at(1)) && guest.space.testYoung(at(2)))
        #expect(!guest.space.clearYoung(pages(0..<2)))
        #expect(guest.space.clearFlushYoung(pages(2..<3)) && !guest.space.clearFlushYoung(pages(2..<3)))
        #expect(!guest.space.testYoung(at(20)))
        #expect(guest.vm.invalidateSequence.load(ordering: .relaxed) == sequence)
        #expect(guest.leafCount == 4)
        guest.check()
    }

    @Test(arguments: Architecture.twoStage)
    func `a flush goes out while mmu_lock is held, and only if something was mapped`(architecture: Architecture) throws
    {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 4)
        guest.store(0, 1)
        let before = guest.test.events(.flush).count
        try guest.space.advise(pages(2..<3), .dontNeed)
        #expect(guest.test.events(.flush).count == before)
        try guest.space.advise(pages(0..<1), .dontNeed)
        #expect(guest.test.events(.flush).count == before + 1)
        #expect(guest.cpus[0].hasRequest, "I-13: the vCPU drops its translations before it runs again")
        #expect(guest.load(0) == .value(0))
    }

    @Test(arguments: Architecture.twoStage)
    func `the death of the address space removes everything`(architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 4)
        for page in 0..<4 { guest.store(page, 1) }
        guest.space.exit()
        #expect(guest.leafCount == 0)
    }
}
