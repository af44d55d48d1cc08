import Audit
import Frames
import Machine
import Testing

@testable import GuestMemory
@testable import HostMemory

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

    private func compare(_ guest: TestGuest, _ known: [UInt32: Known], _ seed: UInt64) throws {
        try #require(guest.vm.slotSetsAgree(), "seed \(seed)")
        let sets = [guest.vm.slotSets[0].active, guest.vm.slotSets[0].inactive]
        for set in sets {
            #expect(set.count == known.count, "seed \(seed)")
            #expect(set.isConsistent, "seed \(seed)")
            for index in [set.byFrame.all, set.byAddress.all] {
                #expect(Set(index.map(\.id)) == Set(known.keys.map { UInt16($0) }), "seed \(seed)")
            }
            for slot in set.byFrame.all {
                let seen = Known(
                    base: Int(slot.baseFrame.number) - 0x200, pages: Int(slot.pageCount),
                    host: Int(slot.userAddress.page) - Int(at(0).page), log: slot.isLogged,
                    readOnly: slot.flags.readOnly)
                #expect(known[UInt32(slot.id)] == seen && !slot.isInvalid, "seed \(seed)")
                #expect((slot.dirtyBitmap != nil) == slot.isLogged, "seed \(seed)")
            }
        }
        let found = (-1...70).map { page in guest.vm.withSlots { guest.vm.slot(containing: gfn(page)) } }
        let holders = (-1...70).map { page in known.first { $0.value.range.contains(page) } }
        #expect(found.map { $0.map { UInt32($0.id) } } == holders.map { $0?.key }, "seed \(seed)")
        let addresses = zip(found, -1...70).map { slot, page in slot?.userAddress(of: gfn(page)) }
        let expected = zip(holders, -1...70).map { holder, page in
            holder.map { at($0.value.host + page - $0.value.base) }
        }
        #expect(addresses == expected, "seed \(seed)")
        #expect(guest.vm.loggingSlots.load(ordering: .relaxed) == known.values.filter(\.log).count, "seed \(seed)")
    }

    @Test(arguments: [UInt64(3), 99, 2024], [Architecture.x86TDP, .riscvSv39x4])
    func `random changes answer and end as the naive model says`(seed: UInt64, architecture: Architecture) throws {
        let guest = TestGuest(architecture, ramFrames: 4096)
        try guest.space.mapPages(0, 40)
        var random = TestRandom(seed: seed)
        var known: [UInt32: Known] = [:]
        for round in 0..<300 {
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
            try compare(guest, known, seed)
            if round % 25 == 0 { guest.check() }
        }
        guest.check()
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
