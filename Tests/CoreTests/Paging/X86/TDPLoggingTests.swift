import Frames
import HostMemory
import Paging
import Synchronization
import Testing

@testable import GuestMemory

/// W, MW and HW go together in four ways only. Spec: x86 1.4.
private func isLegal(_ entry: UInt64) -> Bool {
    let states = (entry & EntryBit.hostWritable != 0, entry & EntryBit.mmuWritable != 0, entry & EntryBit.write != 0)
    return states == (true, true, true) || states == (true, true, false) || states == (true, false, false)
        || states == (false, false, false)
}

@Suite struct X19_X39_X44_DirtyLogging {
    @Test func `turning it on takes W, keeps MW, and splits what is huge`() throws {
        let machine = TDPMachine(thp: true)
        try machine.slot(count: 1030)
        machine.fault(.write, 700)
        machine.fault(.write, 1025)
        let huge = try #require(machine.leaf(700))
        #expect(huge.level == .page2M)
        let flushes = machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed)
        try machine.logging(true, count: 1030)
        let leaves = machine.leaves()
        #expect(leaves.count == 513)
        for leaf in leaves {
            #expect(leaf.level == .page4K && !leaf.writable && isLegal(leaf.entry))
            #expect(leaf.entry & EntryBit.mmuWritable != 0)
            #expect(leaf.frame == machine.space.translate(at(Int(leaf.guestFrame.number)))?.frame)
        }
        #expect(machine.statistics.pages_2m.load(ordering: .relaxed) == 0)
        #expect(machine.statistics.pages_4k.load(ordering: .relaxed) == 513)
        #expect(machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed) == flushes + 1)
        #expect(try machine.dirtyLog().allSatisfy { $0 == 0 })
    }

    @Test func `no write goes unreported (X43)`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 70)
        for frame in UInt64(0)..<70 { machine.cpu.write(frame, 1) }
        try machine.logging(true, count: 70)
        #expect(machine.cpu.write(3, 2) == .done(.stored))
        #expect(machine.cpu.write(66, 2) == .done(.stored))
        #expect(try machine.dirtyLog() == [1 << 3, 1 << 2])
        #expect(try machine.dirtyLog() == [0, 0])
        // Through the same TLB: the harvest must have flushed it.
        #expect(machine.cpu.write(3, 3) == .done(.stored))
        #expect(try machine.dirtyLog() == [1 << 3, 0])
        #expect(try machine.space.load(at(3)) == 3)
    }

    @Test func `a harvest protects what it reports and nothing else`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 70)
        try machine.logging(true, count: 70)
        for frame: UInt64 in [1, 2, 65] { machine.cpu.write(frame, 1) }
        var manual = ManualProtect()
        manual.enabled = true
        try machine.vm.setManualProtect(manual)
        #expect(try machine.dirtyLog() == [0b110, 0b10])
        #expect(machine.leaves().allSatisfy { $0.writable })
        try machine.vm.clearDirtyLog(slot: 0, firstPage: 0, pages: 64, bitmap: [0b100])
        #expect(machine.leaves().filter(\.writable).map(\.guestFrame.number) == [1, 65])
        // MW stays: only so may the lockless path give W back.
        #expect(machine.leaves().allSatisfy { $0.entry & EntryBit.mmuWritable != 0 })
        #expect(try machine.dirtyLog() == [0b010, 0b10])
    }

    @Test func `a slot that does not start at a multiple of 64 frames is protected at the right place`() throws {
        let machine = TDPMachine()
        try machine.slot(frame: 500, count: 100)
        try machine.logging(true, frame: 500, count: 100)
        for frame in UInt64(500)..<600 { machine.cpu.write(frame, 1) }
        #expect(try machine.dirtyLog() == [~0, (1 << 36) - 1])
        #expect(machine.leaves().allSatisfy { !$0.writable })
        machine.cpu.write(511, 2)
        machine.cpu.write(512, 2)
        #expect(try machine.dirtyLog() == [0b11 << 11, 0])
    }

    @Test func `a read that makes a page writable logs it (X44)`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        try machine.space.store(at(1), 5)
        try machine.logging(true, count: 4)
        machine.fault(.read, 1)
        #expect(machine.leaf(1)?.writable == true)
        #expect(try machine.dirtyLog() == [0b10])
    }

    @Test func `a fault in a logged slot maps 4 KiB however large the host's page (X39)`() throws {
        let machine = TDPMachine(thp: true)
        try machine.slot(count: 1024)
        try machine.logging(true, count: 1024)
        machine.fault(.write, 700)
        #expect(machine.leaves().map(\.level) == [.page4K])
        #expect(machine.space.translate(at(700))?.level == .page2M)
    }

    @Test func `a bitmap that begins all ones leaves huge leaves until they are cleared`() throws {
        let machine = TDPMachine(thp: true)
        try machine.slot(count: 1024)
        machine.fault(.write, 5)
        var manual = ManualProtect()
        manual.enabled = true
        manual.initiallySet = true
        try machine.vm.setManualProtect(manual)
        try machine.logging(true, count: 1024)
        #expect(machine.leaf(5)?.level == .page2M && machine.leaf(5)?.writable == true)
        try machine.vm.clearDirtyLog(slot: 0, firstPage: 0, pages: 64, bitmap: [1 << 5])
        #expect(machine.leaves().count == 512)
        #expect(machine.leaves().filter { !$0.writable }.map(\.guestFrame.number) == [5])
    }

    @Test func `without memory to split, the huge leaf loses W, and is split by the write that needs it`() throws {
        let machine = TDPMachine(ramFrames: 2048, thp: true)
        try machine.slot(count: 512)
        machine.fault(.write, 5)
        var taken: [HostFrame] = []
        while let frame = machine.test.host.allocateTable(order: 0, fill: 0) { taken.append(frame) }
        try machine.logging(true, count: 512)
        #expect(machine.leaf(5)?.level == .page2M && machine.leaf(5)?.writable == false)
        #expect(machine.fault(.write, 5, present: true) == .failed(.ENOMEM))
        for frame in taken { machine.test.host.freeTable(frame) }
        #expect(machine.fault(.write, 5, present: true) == .fixed)
        #expect(machine.leaves().count == 512)
        #expect(machine.leaves().filter(\.writable).map(\.guestFrame.number) == [5])
        #expect(try machine.dirtyLog()[0] == 1 << 5)
    }

    @Test func `clearing D leaves W, and a store sets D again`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 8)
        for frame in UInt64(0)..<8 { machine.cpu.write(frame, 1) }
        #expect(machine.mmu.clearDirty(machine.vm.activeSlots[0]))
        #expect(machine.leaves().allSatisfy { !$0.dirty && $0.writable })
        #expect(!machine.mmu.clearDirty(machine.vm.activeSlots[0]))
        machine.cpu.write(3, 2)
        #expect(machine.leaves().filter(\.dirty).map(\.guestFrame.number) == [3])
    }

    @Test func `where hardware keeps no D, W stands in for it`() throws {
        let machine = TDPMachine(mmu: TDPMMU(accessDirty: false))
        try machine.slot(count: 8)
        for frame in UInt64(0)..<8 { machine.cpu.write(frame, 1) }
        #expect(machine.mmu.clearDirty(machine.vm.activeSlots[0]))
        #expect(machine.leaves().allSatisfy { !$0.writable })
        #expect(machine.cpu.write(3, 2) == .done(.stored))
    }
}

@Suite struct X86_2_6_FastPageFault {
    private func logged(_ machine: TDPMachine) throws {
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        try machine.logging(true, count: 4)
    }

    @Test func `a write to a page protected for the log needs no translation and touches no page`() throws {
        let machine = TDPMachine()
        try logged(machine)
        let translated = machine.events(.translated).count
        let marked = machine.events(.markedDirty).count
        #expect(machine.fault(.write, 1, present: true) == .fixed)
        #expect(machine.statistics.pf_fast.load(ordering: .relaxed) == 1)
        #expect(machine.statistics.pf_fixed.load(ordering: .relaxed) == 2)
        #expect(machine.events(.translated).count == translated)
        #expect(machine.events(.markedDirty).count == marked)
        #expect(machine.leaf(1)?.writable == true)
        #expect(try machine.dirtyLog() == [0b10])
    }

    @Test func `it does not set D: that is the hardware's`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        machine.mmu.clearDirty(machine.vm.activeSlots[0])
        machine.mmu.writeProtect(machine.vm.activeSlots[0])
        #expect(machine.fault(.write, 1, present: true) == .fixed)
        #expect(machine.leaf(1)?.writable == true && machine.leaf(1)?.dirty == false)
    }

    @Test func `without MW it leaves the entry alone`() throws {
        let machine = TDPMachine()
        try logged(machine)
        let old = machine.word(1).load()
        machine.word(1).store(old & ~EntryBit.mmuWritable)
        #expect(machine.fault(.write, 1, present: true) == .fixed)
        #expect(machine.statistics.pf_fast.load(ordering: .relaxed) == 0)
        #expect(machine.leaf(1)?.entry == old | EntryBit.write)
    }

    @Test func `a read, and a miss, go the slow way`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        #expect(machine.fault(.read, 1, present: true) == .spurious)
        #expect(machine.fault(.write, 1, present: false) == .spurious)
        #expect(machine.fault(.write, 2, present: true) == .fixed)
        #expect(machine.statistics.pf_fast.load(ordering: .relaxed) == 0)
    }

    @Test func `a huge leaf of a slot that is not logged gets W back whole`() throws {
        let machine = TDPMachine(thp: true)
        try machine.slot(count: 1024)
        machine.fault(.write, 700)
        machine.mmu.writeProtect(machine.vm.activeSlots[0])
        #expect(machine.fault(.write, 800, present: true) == .fixed)
        #expect(machine.statistics.pf_fast.load(ordering: .relaxed) == 1)
        #expect(machine.leaf(700)?.level == .page2M && machine.leaf(700)?.writable == true)
    }
}
