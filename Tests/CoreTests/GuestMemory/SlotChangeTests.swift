import Audit
import Frames
import Machine
import Synchrony
import Testing

@testable import GuestMemory
@testable import HostMemory

/// How each change of a slot goes.
@Suite struct G4_5_Changes {
    @Test func `create and flags are one generation, delete and move two`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 8)
        #expect(guest.vm.slotsGeneration == 0)
        try guest.setSlot(0, pages: 4)
        #expect(guest.vm.slotsGeneration == 1)
        try guest.setSlot(0, pages: 4, log: true)
        #expect(guest.vm.slotsGeneration == 2)
        try guest.setSlot(0, guest: 32, pages: 4, host: 0, log: true)
        #expect(guest.vm.slotsGeneration == 4)
        try guest.deleteSlot()
        #expect(guest.vm.slotsGeneration == 6)
    }

    /// What others see while the MMU removes a slot's entries.
    private final class Watching {
        var calls = 0
        var seen: [MemorySlot] = []
        var generations: [UInt64] = []
    }

    private func flushing(_ guest: TestGuest, _ change: () throws -> Void) throws -> Watching {
        let watching = Watching()
        // Every request to the vCPUs during the change comes from the flush of the slot.
        let interposer = Interposer(0, when: { guest.vm.activeSlots.contains { $0.isInvalid } }) {
            watching.calls += 1
            watching.seen = guest.vm.activeSlots
            watching.generations.append(guest.vm.slotsGeneration)
        }
        // slots_lock is held throughout, so the interposer counts points with it held.
        interposer.ignoring(LockRank.slots)
        try interposer.run(change)
        return watching
    }

    @Test(arguments: Architecture.allCases, [true, false])
    func `delete and move show an INVALID slot while the entries go, and I-21: none is left`(
        architecture: Architecture, deletes: Bool
    ) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 4)
        for page in 0..<4 { guest.store(page, UInt64(page) + 1) }
        #expect(guest.leafCount == 4)
        let watching = try flushing(guest) {
            if deletes { try guest.deleteSlot() } else { try guest.setSlot(guest: 64, pages: 4, host: 0) }
        }
        #expect(watching.calls == 1 && watching.seen.count == 1 && watching.seen.allSatisfy { $0.isInvalid })
        #expect(guest.leafCount == 0)
        guest.check()
        if deletes {
            #expect(guest.vm.activeSlots.isEmpty && guest.load(0) == .mmio)
        } else {
            #expect(guest.load(0) == .mmio && guest.load(64) == .value(1))
            #expect(guest.vm.activeSlots.map(\.frames) == [gfn(64)..<gfn(68)])
        }
        #expect(try guest.space.load(at(2)) == 3, "the process's memory is not touched")
    }

    @Test(arguments: Architecture.allCases)
    func `a slot that is being deleted gives no frame, and the guest on x86 waits for the end`(
        architecture: Architecture
    ) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 1)
        guest.store(0, 1)
        var outcome: GuestMemory.FaultOutcome?
        let interposer = Interposer(0, when: { guest.vm.activeSlots.contains { $0.isInvalid } }) {
            let fault = GuestFault(address: gfn(0).address, access: .read, entryPresent: false)
            let cpu = guest.cpus[0]
            if cpu.root == nil { guest.vm.mmu.loadRoot(cpu) }
            outcome = guest.vm.withSlots { guest.vm.mmu.handleFault(cpu, fault) }
        }
        interposer.ignoring(LockRank.slots)
        try interposer.run { try guest.deleteSlot() }
        #expect(outcome == (architecture == .x86TDP ? .retry : .emulate))
        #expect(guest.test.events(.entryInstalled).count == 1, "nothing was installed through the dying slot")
    }

    @Test(arguments: Architecture.allCases)
    func `a move that is refused brings the old slot back, empty`(architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 4)
        guest.store(0, 5)
        var region = guest.region(0, pages: 4)
        region.guestAddress = GuestAddress(1 << UInt64(guest.vm.mmu.guestAddressBits))
        #expect(throws: architecture == .x86TDP ? Errno.EINVAL : .EFAULT) { try guest.vm.setMemoryRegion(region) }
        #expect(guest.vm.activeSlots.map(\.frames) == [gfn(0)..<gfn(4)])
        #expect(guest.vm.activeSlots.allSatisfy { !$0.isInvalid } && guest.vm.slotSetsAgree())
        #expect(guest.vm.slotsGeneration == 3, "its entries are gone, so what was cached must be, too")
        #expect(guest.leafCount == 0 && guest.load(0) == .value(5))
        guest.check()
    }

    @Test(arguments: Architecture.allCases)
    func `a change of flags keeps the entries, their write access follows the log`(architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 2)
        for page in 0..<2 { guest.store(page, 1) }
        try guest.setSlot(pages: 2, log: true)
        #expect(guest.leafCount == 2 && guest.leaf(0)?.writable == false)
        guest.check()
        guest.store(0, 2)
        try guest.setSlot(pages: 2)
        #expect(guest.leafCount == 2)
        #expect(guest.vm.activeSlots[0].dirtyBitmap == nil)
        guest.check()
    }

    @Test func `a move keeps what was logged`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 4, log: true)
        guest.store(2, 1)
        try guest.setSlot(guest: 64, pages: 4, host: 0, log: true)
        #expect(try guest.vm.getDirtyLog(slot: 0).pages == [2])
    }

    @Test func `two slots may show the same memory, and lose their entries together`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 2)
        try guest.setSlot(0, guest: 0, pages: 2, host: 0)
        try guest.setSlot(1, guest: 100, pages: 2, host: 0)
        #expect(guest.store(0, 5) == .stored && guest.load(100) == .value(5))
        #expect(guest.leaf(0)?.frame == guest.leaf(100)?.frame)
        try guest.space.advise(pages(0..<1), .dontNeed)
        #expect(guest.leafCount == 0)
        guest.check()
    }

    @Test(arguments: Architecture.allCases)
    func `deleting one slot leaves the others' memory as it is`(architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        try guest.space.mapPages(0, 8)
        try guest.setSlot(0, guest: 0, pages: 4)
        try guest.setSlot(1, guest: 4, pages: 4)
        for page in 0..<8 { guest.store(page, UInt64(page)) }
        try guest.deleteSlot(0)
        guest.check()
        for page in 4..<8 { #expect(guest.load(page) == .value(UInt64(page))) }
    }
}

/// I-20: both sets agree after every change, against a model that knows nothing of sets.
@Suite struct I20_SlotSetsAgree {
    private struct Known: Equatable {
        var base: Int
        var pages: Int
        var host: Int
        var log: Bool
        var readOnly: Bool
        var range: Range<Int> { base..<(base + pages) }
    }

    /// What a change should answer, and what it makes of the slots.
    private func apply(
        _ known: inout [UInt32: Known], _ id: UInt32, _ wish: Known?
    ) -> (errno: Errno?, generations: UInt64) {
        let old = known[id]
        guard let wish else {
            if old == nil { return (.EINVAL, 0) }
            known[id] = nil
            return (nil, 2)
        }
        let overlaps = known.contains { $0.key != id && $0.value.range.overlaps(wish.range) }
        guard let old else {
            if overlaps { return (.EEXIST, 0) }
            known[id] = wish
            return (nil, 1)
        }
        if old.pages != wish.pages || old.host != wish.host || old.readOnly != wish.readOnly { return (.EINVAL, 0) }
        if old.base != wish.base {
            if overlaps { return (.EEXIST, 0) }
            known[id] = wish
            return (nil, 2)
        }
        if old.log == wish.log { return (nil, 0) }
        known[id] = wish
        return (nil, 1)
    }

    private func compare(_ guest: TestGuest, _ known: [UInt32: Known], _ seed: UInt64) {
        #expect(guest.vm.slotSetsAgree(), "seed \(seed)")
        let sets = [guest.vm.slots.active, guest.vm.slots.inactive]
        for set in sets {
            #expect(set.byFrame.count == known.count, "seed \(seed)")
            #expect(set.byAddress.map(\.userAddress) == set.byAddress.map(\.userAddress).sorted(), "seed \(seed)")
            for index in [set.byFrame, set.byIdentity, set.byAddress] {
                #expect(Set(index.map(\.id)) == Set(known.keys.map { UInt16($0) }), "seed \(seed)")
            }
            for slot in set.byFrame {
                let seen = Known(
                    base: Int(slot.baseFrame.number) - 0x200, pages: Int(slot.pageCount),
                    host: Int(slot.userAddress.page) - Int(at(0).page), log: slot.isLogged,
                    readOnly: slot.flags.readOnly)
                #expect(known[UInt32(slot.id)] == seen && !slot.isInvalid, "seed \(seed)")
                #expect((slot.dirtyBitmap != nil) == slot.isLogged, "seed \(seed)")
            }
        }
        for page in -1...70 {
            let holder = known.first { $0.value.range.contains(page) }
            let slot = guest.vm.withSlots { guest.vm.slot(containing: gfn(page)) }
            #expect(slot.map { UInt32($0.id) } == holder?.key, "seed \(seed)")
            if let slot, let holder {
                #expect(slot.userAddress(of: gfn(page)) == at(holder.value.host + page - holder.value.base))
            }
        }
        #expect(guest.vm.loggingSlots.load(ordering: .relaxed) == known.values.filter(\.log).count, "seed \(seed)")
    }

    @Test(arguments: [UInt64(3), 99, 2024], [Architecture.x86TDP, .riscvSv39x4])
    func `random changes answer and end as the naive model says`(seed: UInt64, architecture: Architecture) throws {
        let guest = TestGuest(architecture, ramFrames: 4096)
        try guest.space.mapPages(0, 40)
        var random = TestRandom(seed: seed)
        var known: [UInt32: Known] = [:]
        for _ in 0..<300 {
            let id = UInt32.random(in: 0..<6, using: &random)
            var wish: Known? = Known(
                base: Int.random(in: 0..<48, using: &random), pages: Int.random(in: 1...12, using: &random),
                host: Int.random(in: 0..<24, using: &random), log: Bool.random(using: &random),
                readOnly: Int.random(in: 0..<4, using: &random) == 0)
            switch Int.random(in: 0..<6, using: &random) {
            case 0: wish = nil
            case 1, 2, 3:
                if var changed = known[id] {
                    if Bool.random(using: &random) { changed.base = wish!.base } else { changed.log.toggle() }
                    wish = changed
                }
            default: break
            }
            let generation = guest.vm.slotsGeneration
            let expected = apply(&known, id, wish)
            var errno: Errno?
            do throws(Errno) {
                if let wish {
                    try guest.setSlot(
                        id, guest: wish.base, pages: wish.pages, host: wish.host, log: wish.log,
                        readOnly: wish.readOnly)
                } else {
                    try guest.deleteSlot(id)
                }
            } catch { errno = error }
            #expect(errno == expected.errno, "seed \(seed)")
            #expect(guest.vm.slotsGeneration == generation + expected.generations, "seed \(seed)")
            for page in [0, 17, 40] where known.values.contains(where: { $0.range.contains(page) }) {
                _ = guest.store(page, 1)
            }
            compare(guest, known, seed)
            guest.check()
        }
    }

    @Test func `the hint of the last search never outlives its slot`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 16)
        for id in 0..<4 { try guest.setSlot(UInt32(id), guest: id * 4, pages: 4) }
        for id in [3, 0, 2, 1] {
            #expect(guest.vm.slot(containing: gfn(id * 4 + 3))?.id == UInt16(id))
            try guest.deleteSlot(UInt32(id))
            #expect(guest.vm.slot(containing: gfn(id * 4 + 3)) == nil)
        }
    }
}
