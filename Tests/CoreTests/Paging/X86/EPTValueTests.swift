import Frames
import GuestMemory
import HostMemory
import Paging
import Testing

/// The exact entries of spec x86 1.1 and 1.4.
@Suite struct X86_1_4_EPTValues {
    @Test func `a writable 4 KiB leaf of RAM`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        #expect(machine.fault(.write, 1) == .fixed)
        let leaf = try #require(machine.leaf(1))
        #expect(leaf.entry == 0x8600_0000_0000_0b77 | leaf.frame.physicalAddress)
        #expect(leaf.frame == machine.space.translate(at(1))?.frame)
    }

    @Test func `a writable 2 MiB leaf of RAM`() throws {
        let machine = TDPMachine(thp: true)
        try machine.slot(count: 1024)
        #expect(machine.fault(.write, 700) == .fixed)
        let leaf = try #require(machine.leaf(700))
        #expect(leaf.level == .page2M && leaf.guestFrame == GuestFrame(512))
        #expect(leaf.entry == 0x8600_0000_0000_0bf7 | leaf.frame.physicalAddress)
        #expect(leaf.frame == machine.space.translate(at(512))?.frame)
    }

    @Test func `a leaf whose host page is read-only has HW, MW and W clear, and D`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        // A read finds the page of zeros.
        #expect(machine.fault(.read, 0) == .fixed)
        let leaf = try #require(machine.leaf(0))
        #expect(leaf.entry == 0x8000_0000_0000_0975 | machine.test.host.zeroPage.physicalAddress)
    }

    @Test func `a read of a page that the host may write gives W and D at once`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        try machine.space.store(at(0), 7)
        #expect(machine.fault(.read, 0) == .fixed)
        #expect(machine.leaf(0)?.entry == 0x8600_0000_0000_0b77 | machine.leaf(0)!.frame.physicalAddress)
    }

    @Test func `device memory is uncached and the guest's PAT counts`() throws {
        let machine = TDPMachine(deviceFrames: 16)
        let bar = try #require(DeviceBAR(machine.test.host, pages: 4, filling: .byFault))
        try machine.slot(count: 4, backing: .driver(bar))
        #expect(machine.fault(.write, 2) == .fixed)
        #expect(machine.leaf(2)?.entry == 0x8600_0000_0000_0b07 | bar.frames.lowerBound.advanced(by: 2).physicalAddress)
    }

    @Test func `a reserved frame of RAM is write-back`() throws {
        let machine = TDPMachine()
        let carveOut = try #require(ReservedMemory(machine.test.host, pages: 4))
        try machine.slot(count: 4, backing: .driver(carveOut))
        #expect(machine.fault(.write, 1) == .fixed)
        #expect(machine.leaf(1)!.entry & 0x78 == 0x70)
    }

    @Test(arguments: [true, false]) func `links and empty entries`(accessDirty: Bool) throws {
        let machine = TDPMachine(mmu: TDPMMU(accessDirty: accessDirty))
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        for level in UInt8(2)...4 {
            let link = machine.word(1, level: level).load() & ~EntryBit.frame
            #expect(link == (accessDirty ? 0x8000_0000_0000_0907 : 0x8010_0000_0000_0807))
        }
        #expect(machine.word(2).load() == EntryBit.empty)
        #expect(machine.word(512, level: 2).load() == EntryBit.empty)
    }

    @Test func `without A and D in hardware the leaf's type is 01, with bits 8 and 9 as software's`() throws {
        let machine = TDPMachine(mmu: TDPMMU(accessDirty: false))
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        #expect(machine.leaf(1)!.entry & ~EntryBit.frame == 0x8610_0000_0000_0b77)
    }

    @Test(arguments: [true, false]) func `the EPT pointer`(accessDirty: Bool) {
        let mmu = TDPMMU(accessDirty: accessDirty)
        let machine = TDPMachine(mmu: mmu)
        let low: UInt64 = accessDirty ? 0x5e : 0x1e
        #expect(mmu.eptPointer(for: machine.cpu) == machine.test.host.zeroPage.physicalAddress | low)
        mmu.loadRoot(machine.cpu)
        #expect(mmu.eptPointer(for: machine.cpu) == machine.cpu.root!.physicalAddress | low)
    }

    @Test func `hardware translates what was installed, small and huge`() throws {
        let machine = TDPMachine(thp: true)
        try machine.slot(frame: 512, page: 512, count: 513)
        #expect(machine.cpu.write(600, 42) == .done(.stored))
        #expect(machine.cpu.write(1024, 43) == .done(.stored))
        #expect(machine.leaf(600)?.level == .page2M && machine.leaf(1024)?.level == .page4K)
        #expect(try machine.space.load(at(600)) == 42)
        #expect(try machine.space.load(at(1024)) == 43)
    }
}
