import Frames
import Machine
import SeededRandom
import Testing

@testable import GuestMemory
@testable import HostMemory

/// The indexes of a set of slots, beside a plain list.
@Suite struct G4_1_SlotIndexes {
    private func slot(_ id: Int, base: Int, pages: Int, user: Int) -> MemorySlot {
        MemorySlot(
            id: UInt16(id), baseFrame: GuestFrame(UInt64(base)), pageCount: UInt64(pages),
            userAddress: UserAddress(UInt64(user) << 12), flags: SlotFlags(), dirtyBitmap: nil)
    }

    @Test(arguments: [UInt64(1), 7, 2026])
    func `a thousand slots are found by frame, by identity and by user address`(seed: UInt64) {
        var random = SplitMix(seed: seed)
        let set = SlotSet(generation: 0)
        var known: [MemorySlot] = []
        for round in 0..<6000 {
            let id = Int.random(in: 0..<1200, using: &random)
            if let index = known.firstIndex(where: { Int($0.id) == id }) {
                let old = known[index]
                if Bool.random(using: &random) {
                    set.replace(old, by: nil)
                    known.remove(at: index)
                } else {
                    // In place, or elsewhere.
                    let base = Bool.random(using: &random) ? Int(old.baseFrame.number) : 40_000 + id * 16
                    let new = slot(id, base: base, pages: Int(old.pageCount), user: Int(old.userAddress.page))
                    set.replace(old, by: new)
                    known[index] = new
                }
            } else {
                let new = slot(
                    id, base: id * 16, pages: Int.random(in: 1...16, using: &random),
                    user: Int.random(in: 0..<200, using: &random) * 8)
                set.replace(nil, by: new)
                known.append(new)
            }
            if round % 500 == 0 { #expect(set.isConsistent, "seed \(seed)") }
            let probe = Int.random(in: 0..<60_000, using: &random)
            let holder = known.first { $0.frames.contains(GuestFrame(UInt64(probe))) }
            for _ in 0..<2 { #expect(set.slot(containing: GuestFrame(UInt64(probe))) === holder, "seed \(seed)") }
            #expect(set.slot(id: UInt16(id)) === known.first { Int($0.id) == id }, "seed \(seed)")
            if round % 50 == 0 { compareUserRange(set, known, &random, seed) }
        }
        #expect(set.count == known.count && set.isConsistent, "seed \(seed)")
    }

    private func compareUserRange(
        _ set: SlotSet, _ known: [MemorySlot], _ random: inout SplitMix, _ seed: UInt64
    ) {
        let first = UInt64.random(in: 0..<1700, using: &random)
        let range = UserAddress(first << 12)..<UserAddress((first + UInt64.random(in: 1...40, using: &random)) << 12)
        var found: [UInt16] = []
        set.forEach(intersecting: range) { slot, frames in
            #expect(slot.frames(intersecting: range) == frames, "seed \(seed)")
            found.append(slot.id)
        }
        #expect(Set(found).count == found.count, "seed \(seed)")
        #expect(
            Set(found) == Set(known.filter { $0.userRange.overlaps(range) }.map(\.id)), "seed \(seed)")
    }

    @Test func `slots that show the same memory are all heard by the notifier, and each can go`() {
        let set = SlotSet(generation: 0)
        let slots = (0..<700).map { slot($0, base: $0 * 2, pages: 2, user: 64) }
        for slot in slots { set.replace(nil, by: slot) }
        for slot in slots.reversed() {
            var heard = 0
            set.forEach(intersecting: slot.userRange) { _, _ in heard += 1 }
            #expect(heard == Int(slot.id) + 1)
            set.replace(slot, by: nil)
        }
        #expect(set.count == 0 && set.isConsistent)
    }
}

/// Rows 0, 18, 20, 21, 22 and the internal slots.
@Suite struct G4_4_Failures {
    @Test func `18, 20, 21, 22: each allocation of each change fails once, and the slots stay as they are`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 16)
        try guest.setSlot(0, pages: 4)
        // What each change allocates: the slot, its bitmap, the MMU's counts; a second object where it is INVALID first.
        let changes: [(MemoryRegion, Int)] = [
            (guest.region(1, guest: 8, pages: 4, log: true), 3), (guest.region(0, pages: 4, log: true), 2),
            (guest.region(0, guest: 32, pages: 4, host: 0, log: true), 3),
            (MemoryRegion(slot: 0, guestAddress: GuestAddress(0), size: 0, userAddress: at(0)), 1),
        ]
        for (region, allocations) in changes {
            for failing in 1...allocations {
                let before = guest.vm.activeSlots.map { ObjectIdentifier($0) }
                guest.test.memory.failAllocation(failing)
                #expect(throws: Errno.ENOMEM) { try guest.vm.setMemoryRegion(region) }
                #expect(!guest.test.memory.allocationIsToFail)
                #expect(guest.vm.activeSlots.map { ObjectIdentifier($0) } == before)
                #expect(guest.vm.slotSetsAgree() && guest.load(1) != .mmio)
            }
            guest.test.memory.failAllocation(allocations + 1)
            try guest.vm.setMemoryRegion(region)
            #expect(guest.test.memory.allocationIsToFail, "it allocates more than the table says")
            guest.test.memory.failAllocation(0)
            if region.size != 0, region.slot == 0, region.guestAddress != gfn(0).address {
                try guest.deleteSlot(0)
                try guest.setSlot(0, pages: 4)
            }
        }
    }

    @Test func `a move that fails after the slot was INVALID makes the old one valid again`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 4)
        #expect(guest.store(1, 7) == .stored)
        let old = guest.vm.activeSlots[0]
        let generation = guest.vm.slotsGeneration
        guest.test.memory.failAllocation(3)
        #expect(throws: Errno.ENOMEM) { try guest.setSlot(guest: 64, pages: 4, host: 0) }
        #expect(guest.vm.activeSlots[0] === old && guest.vm.slotsGeneration == generation + 2)
        #expect(guest.leafCount == 0 && guest.load(1) == .value(7))
    }

    @Test func `0: another process, and a dead VM`() throws {
        let guest = TestGuest()
        let other = guest.test.space()
        try guest.vm.checkCaller(guest.space)
        #expect(throws: Errno.EIO) { try guest.vm.checkCaller(other) }
        guest.vm.die()
        #expect(throws: Errno.EIO) { try guest.vm.checkCaller(guest.space) }
        other.exit()
    }

    @Test func `an internal slot is one in every address space, and out of the user's reach`() throws {
        let guest = TestGuest(.x86TDP, addressSpaces: 2)
        try guest.space.mapPages(0, 4)
        let region = guest.region(VirtualMachine.userSlots, pages: 1)
        for bad in [VirtualMachine.userSlots - 1, 32767] {
            var region = region
            region.slot = bad
            #expect(throws: Errno.EINVAL) { try guest.vm.setInternalRegion(region) }
        }
        #expect(throws: Errno.EINVAL) { try guest.vm.setMemoryRegion(region) }
        try guest.vm.setInternalRegion(region)
        #expect(guest.vm.activeSlots.map(\.number) == [32764, 1 << 16 | 32764])
        #expect(throws: Errno.EEXIST) { try guest.vm.setInternalRegion(region) }
        guest.vm.withSlots { #expect(!guest.vm.isVisible(gfn(0))) }
        #expect(throws: Errno.EINVAL) { try guest.vm.getDirtyLog(slot: VirtualMachine.userSlots) }
        var gone = region
        gone.size = 0
        for _ in 0..<2 { try guest.vm.setInternalRegion(gone) }
        #expect(guest.vm.activeSlots.isEmpty)
    }
}

/// A vCPU in system management mode sees other memory. Spec: generic 1.1, 2.1, 4.2.
@Suite struct G4_2_AddressSpaces {
    /// Frame 0 shows page 0 normally and page 8 in system management mode.
    private func guest() throws -> TestGuest {
        let guest = TestGuest(.x86TDP, cpus: 2, addressSpaces: 2)
        try guest.space.mapPages(0, 16)
        try guest.setSlot(0, guest: 0, pages: 4)
        try guest.setSlot(1 << 16, guest: 0, pages: 4, host: 8)
        return guest
    }

    @Test func `each space shows its own slot, and a vCPU that changes over sees the other`() throws {
        let guest = try guest()
        #expect(guest.store(1, 11) == .stored)
        guest.cpus[1].switchAddressSpace(to: 1)
        #expect(guest.store(1, 22, cpu: 1) == .stored)
        #expect(guest.load(1) == .value(11) && guest.load(1, cpu: 1) == .value(22))
        #expect(try guest.space.load(at(1)) == 11 && guest.space.load(at(9)) == 22)
        guest.check()
        guest.cpus[1].switchAddressSpace(to: 0)
        #expect(guest.load(1, cpu: 1) == .value(11))
        guest.cpus[0].switchAddressSpace(to: 1)
        #expect(guest.load(1) == .value(22))
        guest.check()
    }

    @Test func `a notifier finds the entries of both, and a space is only zapped for its own slots`() throws {
        let guest = try guest()
        #expect(guest.store(1, 1) == .stored)
        guest.cpus[1].switchAddressSpace(to: 1)
        #expect(guest.store(1, 2, cpu: 1) == .stored)
        #expect(guest.leafCount == 2)
        try guest.space.advise(at(9)..<at(10), .dontNeed)
        #expect(guest.leafCount == 1 && guest.load(1) == .value(1) && guest.load(1, cpu: 1) == .value(0))
        try guest.space.unmap(at(0)..<at(16))
        #expect(guest.leafCount == 0)
        #expect(guest.load(1) == .failed(.EFAULT) && guest.load(1, cpu: 1) == .failed(.EFAULT))
        guest.check()
    }

    @Test func `the dirty log of a space names what was written through it`() throws {
        let guest = try guest()
        try guest.vm.setMemoryRegion(
            MemoryRegion(
                slot: 1 << 16, flags: SlotFlags(logDirtyPages: true), guestAddress: gfn(0).address, size: 4 * pageSize,
                userAddress: at(8)))
        #expect(guest.store(2, 1) == .stored)
        guest.cpus[1].switchAddressSpace(to: 1)
        #expect(guest.store(1, 1, cpu: 1) == .stored)
        #expect(try guest.vm.getDirtyLog(slot: 1 << 16) == [2])
        #expect(throws: Errno.ENOENT) { try guest.vm.getDirtyLog(slot: 0) }
        #expect(guest.store(1, 2, cpu: 1) == .stored)
        #expect(try guest.vm.getDirtyLog(slot: 1 << 16) == [2])
    }

    @Test func `generations are never the same in two spaces`() throws {
        let guest = try guest()
        var seen: [UInt64] = []
        for round in 0..<6 {
            try guest.setSlot(UInt32(round % 2) << 16 | 1, guest: 8 + round, pages: 1)
            try guest.deleteSlot(UInt32(round % 2) << 16 | 1)
            seen = [guest.vm.slotsGeneration(of: 0), guest.vm.slotsGeneration(of: 1)]
            #expect(seen[0] % 2 == 0 && seen[1] % 2 == 1)
        }
        // Three steps for a creation and a deletion, three times; one for the slot that was there.
        #expect(seen == [20, 21])
    }

    @Test func `a third space is EINVAL`() throws {
        let guest = try guest()
        #expect(throws: Errno.EINVAL) { try guest.setSlot(2 << 16, guest: 16, pages: 1) }
        #expect(throws: Errno.EINVAL) { try guest.vm.getDirtyLog(slot: 2 << 16) }
    }

    @Test func `a vCPU's hint is not used after a change of slots`() throws {
        let guest = TestGuest(.x86TDP, addressSpaces: 2)
        try guest.space.mapPages(0, 16)
        try guest.setSlot(0, guest: 0, pages: 8)
        let cpu = guest.cpus[0]
        guest.vm.withSlots { #expect(cpu.slot(containing: gfn(7))?.id == 0) }
        try guest.deleteSlot(0)
        try guest.setSlot(1, guest: 4, pages: 8)
        guest.vm.withSlots { #expect(cpu.slot(containing: gfn(7))?.id == 1 && cpu.slot(containing: gfn(3)) == nil) }
        cpu.switchAddressSpace(to: 1)
        guest.vm.withSlots { #expect(cpu.slot(containing: gfn(7)) == nil) }
    }
}
