import Audit
import Frames
import HostMemory
import Synchronization
import Synchrony
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// Rules of the shadow MMU that are checked when they could be broken; each is broken on purpose.
@Suite struct X86_8_ShadowEvents {
    private func broken(_ guest: PagedGuest) -> [Invariant] { guest.test.journal.findings.map(\.invariant) }

    /// A guest that has written page 9.
    private func guest() throws -> PagedGuest {
        let guest = try PagedGuest()
        try guest.identityMap()
        try guest.space.store(at(0), 1)
        #expect(guest.cpus[0].access(.store(5), at: 0x9000) == .stored)
        return guest
    }

    private func fault(
        _ guest: PagedGuest, _ access: AccessKind, present: Bool = false, prefetch: Bool = false
    ) -> GuestMemory.FaultOutcome {
        let fault = GuestFault(
            address: GuestAddress(0x9000), access: access, entryPresent: present, isPrefetch: prefetch)
        return guest.vm.withSlots { guest.mmu.handleFault(guest.cpus[0], fault) }
    }

    /// Does something just before the first write to `word` at which it holds `value`.
    private struct Interruption {
        let word: AtomicWord
        var value: UInt64?
        let action: () -> Void

        func run(_ body: () -> Void) {
            var isDone = false
            let task = TestTask { operation, object in
                guard !isDone, operation == SchedulingPoint.entryWrite.rawValue, object == word.identity else { return }
                guard value == nil || word.peek() == value else { return }
                isDone = true
                TestTask.elsewhere(action)
            }
            _ = task.run(body)
            #expect(isDone)
        }
    }

    @Test func `what the host allows goes in place, with all that follows from it, and a flush (X20)`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        #expect(guest.cpus[0].access(.load, at: 0x9000) == .value(0), "the zero page")
        let word = guest.word(4, 9)
        let old = word.peek()
        // As if the lookup had found the page writable then.
        word.store(old | guest.mmu.bits.hostWritable | guest.mmu.bits.mmuWritable | EntryBits.write)
        let flushes = guest.mmu.flushCount
        #expect(fault(guest, .read, present: true) == .fixed)
        #expect(word.peek() == old && guest.mmu.flushCount == flushes + 1 && broken(guest) == [])
        // One that kept W.
        let slot = guest.vm.activeSlots[0]
        guest.mmu.checkSet(
            old | guest.mmu.bits.hostWritable, old | EntryBits.write, GuestFrame(9), slot, isPrefetch: false,
            isMapped: true, guest.test.journal)
        #expect(broken(guest) == [.x20])
        guest.expectedFindings = 1
    }

    @Test func `a vCPU that faults on an obsolete root and was not asked to leave it (X33)`() throws {
        for isAsked in [true, false] {
            let guest = try guest()
            guest.mmu.zapAllFast()
            if !isAsked { #expect(guest.cpus[0].take(VirtualCPU.Request.reloadRoot)) }
            #expect(fault(guest, .write) == .retry)
            #expect(broken(guest) == (isAsked ? [] : [.x33]))
            guest.expectedFindings = isAsked ? 0 : 1
            guest.mmu.freeObsoleteRoot(guest.cpus[0])
        }
    }

    @Test func `an entry that gives more than the guest's own after a flush (X51)`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        try guest.write(4, 9, 0x9000 | PagedGuest.page | 1 << 63)
        let cpu = guest.cpus[0]
        #expect(cpu.access(.store(5), at: 0x9000) == .stored)
        // Out of sync, by an entry of another page.
        #expect(cpu.access(.store(0xa067), at: 0x4000 + 10 * 8) == .stored)
        cpu.flush(0x9000)
        #expect(broken(guest) == [])
        let word = guest.word(4, 9)
        word.store(word.peek() & ~guest.mmu.bits.noExecute)
        cpu.flush(0x9000)
        #expect(broken(guest) == [.x51])
        guest.expectedFindings = 1
        word.store(word.peek() | guest.mmu.bits.noExecute)
    }

    @Test func `a page that is linked though the guest's entry was read before it was there (X54)`() throws {
        let guest = try guest()
        var walk = GuestWalk()
        walk.confirmedAt = guest.mmu.pagesMade
        guest.mmu.checkConfirmed(guest.page(4)!, walk)
        #expect(broken(guest) == [])
        walk.confirmedAt = guest.page(4)!.serial - 1
        guest.mmu.checkConfirmed(guest.page(4)!, walk)
        #expect(broken(guest) == [.x54])
        guest.expectedFindings = 1
    }

    @Test func `a page that is freed without the flush (X56)`() throws {
        for flushes in [true, false] {
            let guest = try guest()
            let guardian = guest.vm.lockMMU()
            var zapped = ZappedPages()
            guest.mmu.zap(guest.page(4)!, &zapped)
            if flushes { guest.mmu.commit(&zapped) } else { guest.mmu.free(&zapped) }
            guardian.unlock()
            guest.cpus[0].dropTranslations()
            #expect(broken(guest) == (flushes ? [] : [.x56]))
            guest.expectedFindings = flushes ? 0 : 1
        }
    }

    @Test func `a flush of the guest's that changes what the host allows (X57)`() throws {
        let guest = try guest()
        let cpu = guest.cpus[0]
        #expect(cpu.access(.store(0x9027), at: 0x4000 + 9 * 8) == .stored)
        let word = guest.word(4, 9)
        let interruption = Interruption(word: word) { word.store(word.peek() & ~guest.mmu.bits.hostWritable) }
        interruption.run { cpu.flush(0x9000) }
        #expect(broken(guest) == [.x57])
        guest.expectedFindings = 1
    }

    @Test func `a flush of the guest's that gives W to a frame that became a table meanwhile (X57)`() throws {
        let guest = try guest()
        let cpu = guest.cpus[0]
        let map = guest.mmu.reverseMap(guest.vm.activeSlots[0])
        // The supervisor's from now on, and written as before.
        #expect(cpu.access(.store(0x9063), at: 0x4000 + 9 * 8) == .stored)
        let word = guest.word(4, 9)
        let interruption = Interruption(word: word) {
            word.store(word.peek() & ~(EntryBits.write | guest.mmu.bits.mmuWritable))
            map.add(1, GuestFrame(9))
        }
        interruption.run { cpu.flush(0x9000) }
        #expect(broken(guest) == [.x57])
        guest.expectedFindings = 1
        map.add(-1, GuestFrame(9))
    }

    @Test func `a leaf in another's place that lets the guest write a table (X58)`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        try guest.space.store(at(9), 1)
        try guest.space.store(at(10), 1)
        try guest.write(4, 9, 0x9000 | PagedGuest.page | 1 << 63)
        let cpu = guest.cpus[0]
        #expect(cpu.access(.load, at: 0x9000) == .value(1))
        #expect(cpu.access(.store(0xa067), at: 0x4000 + 9 * 8) == .stored)
        let map = guest.mmu.reverseMap(guest.vm.activeSlots[0])
        let word = guest.word(4, 9)
        let interruption = Interruption(word: word, value: EntryBits.empty) { map.add(1, GuestFrame(10)) }
        interruption.run { _ = cpu.access(.fetch, at: 0x9000) }
        #expect(broken(guest) == [.x58])
        guest.expectedFindings = 1
        map.add(-1, GuestFrame(10))
    }

    @Test func `a prefetch that puts its entry in another's place (X59)`() throws {
        for isBroken in [false, true] {
            let guest = try guest()
            let word = guest.word(4, 9)
            let young = word.peek()
            let task = TestTask(undone: isBroken ? .prefetchKeepsEntries : nil)
            #expect(task.run { fault(guest, .read, prefetch: true) }.result == (isBroken ? .fixed : .spurious))
            #expect((word.peek() == young) == !isBroken, "it would be old")
            #expect(broken(guest) == (isBroken ? [.x59] : []))
            guest.expectedFindings = isBroken ? 1 : 0
        }
    }

    @Test func `an entry that the guest's flush makes old (X60)`() throws {
        let guest = try guest()
        let cpu = guest.cpus[0]
        #expect(cpu.access(.store(0x9027), at: 0x4000 + 9 * 8) == .stored)
        _ = TestTask(undone: .syncedIsAccessed).run { cpu.flush(0x9000) }
        #expect(broken(guest) == [.x60])
        guest.expectedFindings = 1
    }
}
