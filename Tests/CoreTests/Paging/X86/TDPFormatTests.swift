import Frames
import Paging
import Testing

@testable import GuestMemory

/// The entries of nested paging, bit for bit, and trees of five levels. Spec: x86 1.1, 1.2, 1.4.
@Suite struct X86_1_4_Formats {
    private func npt(thp: Bool = false) -> TDPMachine { TDPMachine(thp: thp) { $0.format = .npt } }

    @Test func `nested paging: a writable 4 KiB leaf`() throws {
        let machine = npt()
        try machine.slot(count: 4)
        #expect(machine.fault(.write, 1) == .fixed)
        let leaf = try #require(machine.leaf(1))
        #expect(leaf.entry == 0xe67 | leaf.frame.physicalAddress)
        #expect(leaf.writable && leaf.accessed && leaf.dirty)
    }

    @Test func `nested paging: a writable 2 MiB leaf`() throws {
        let machine = npt(thp: true)
        try machine.slot(count: 1024)
        #expect(machine.fault(.write, 700) == .fixed)
        let leaf = try #require(machine.leaf(700))
        #expect(leaf.level == .page2M && leaf.entry == 0xee7 | leaf.frame.physicalAddress)
    }

    @Test func `nested paging: a read-only leaf, links, and empty entries`() throws {
        let machine = npt()
        try machine.slot(count: 4)
        #expect(machine.fault(.read, 1) == .fixed)
        #expect(machine.leaf(1)?.entry == 0x825 | machine.test.host.zeroPage.physicalAddress)
        for level in UInt8(2)...4 { #expect(machine.word(1, level: level).load() & ~EntryBit.frame == 0x827) }
        #expect(machine.word(2).load() == EntryBit.empty)
    }

    @Test func `nested paging: logging, the lockless path and ageing use its own bits`() throws {
        let machine = npt()
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        try machine.logging(true, count: 4)
        #expect(machine.leaf(1)!.entry & ~EntryBit.frame == 0xe65)
        #expect(machine.fault(.write, 1, present: true) == .fixed)
        #expect(machine.leaf(1)!.entry & ~EntryBit.frame == 0xe67)
        #expect(try machine.dirtyLog() == [0b10])
        #expect(machine.space.clearYoung(at(0)..<at(4)))
        #expect(machine.leaf(1)!.entry & ~EntryBit.frame == 0xe45)
        #expect(!machine.space.clearYoung(at(0)..<at(4)))
    }

    @Test func `the root pointer of nested paging is a bare address`() {
        let machine = npt()
        machine.mmu.loadRoot(machine.cpu)
        #expect(machine.mmu.rootPointer(for: machine.cpu) == machine.cpu.root!.physicalAddress)
    }

    @Test func `five levels: the pointer says so, and hardware walks them`() throws {
        let machine = TDPMachine(thp: true) { $0.levels = 5 }
        let high: UInt64 = 1 << 40
        try machine.slot(frame: high, count: 520)
        #expect(machine.cpu.write(high + 5, 42) == .done(.stored))
        #expect(machine.cpu.write(high + 515, 43) == .done(.stored))
        #expect(machine.mmu.rootPointer(for: machine.cpu) & 0xfff == 0x66)
        #expect(try machine.space.load(at(5)) == 42)
        #expect(machine.leaves().map(\.level) == [.page2M, .page4K])
        try machine.logging(true, frame: high, count: 520)
        #expect(machine.leaves().count == 513)
        try machine.space.advise(at(0)..<at(520), .dontNeed)
        #expect(machine.leaves().isEmpty)
        machine.cpu.write(high, 1)
        try machine.set(frame: high, count: 0, SlotFlags())
        #expect(machine.leaves().isEmpty)
    }

    @Test func `guest frames end where the levels do`() throws {
        let four = TDPMachine { $0.levels = 4 }
        try four.space.mapPages(0, 1, .anonymous)
        #expect(throws: Errno.EINVAL) { try four.set(frame: 1 << 36, count: 1, SlotFlags()) }
        let five = TDPMachine { $0.levels = 5 }
        try five.space.mapPages(0, 1, .anonymous)
        try five.set(frame: (1 << 45) - 1, count: 1, SlotFlags())
        #expect(five.fault(.read, (1 << 45) - 1) == .fixed)
        #expect(throws: Errno.EINVAL) { try five.set(1, frame: 1 << 45, count: 1, SlotFlags()) }
    }
}

/// Trees by role. Spec: x86 1.6, 3.1, 4.10.
@Suite struct X86_3_1_Roles {
    @Test func `a nested guest has a tree of its own, and both follow the host`() throws {
        let machine = TDPMachine(cpus: 2)
        try machine.slot(count: 4)
        let (first, second) = (machine.cpus[0], machine.cpus[1])
        machine.fault(.write, 1, cpu: first)
        let own = first.root
        machine.mmu.setGuestMode(true, of: first)
        #expect(first.root == nil)
        machine.fault(.write, 1, cpu: first)
        #expect(first.root != own)
        #expect(machine.leaves().count == 2)
        // Another vCPU shares each by its role.
        machine.fault(.read, 1, cpu: second)
        #expect(second.root == own)
        machine.mmu.setGuestMode(true, of: second)
        machine.mmu.loadRoot(second)
        #expect(second.root == first.root)
        try machine.space.advise(at(1)..<at(2), .dontNeed)
        #expect(machine.leaves().isEmpty)
    }

    @Test func `leaving the nested guest finds the first tree again`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        let own = machine.cpu.root
        machine.mmu.setGuestMode(true, of: machine.cpu)
        machine.mmu.loadRoot(machine.cpu)
        machine.mmu.setGuestMode(false, of: machine.cpu)
        machine.mmu.loadRoot(machine.cpu)
        #expect(machine.cpu.root == own)
        #expect(machine.fault(.read, 1) == .spurious)
    }

    @Test func `the A and D type of a leaf follows its tree`() throws {
        for (entries, accessDirty, guestMode, type) in [
            (UInt32(0), true, false, UInt64(0)), (0, true, true, 0), (0, false, false, 1), (0, false, true, 1),
            (512, true, false, 0), (512, true, true, 2),
        ] {
            let machine = TDPMachine {
                $0.modificationLogEntries = entries
                $0.accessDirty = accessDirty
            }
            try machine.slot(count: 4)
            machine.mmu.setGuestMode(guestMode, of: machine.cpu)
            machine.fault(.write, 1)
            #expect(machine.leaf(1)!.entry >> 52 & 3 == type, "\(entries) \(accessDirty) \(guestMode)")
        }
    }
}

/// What is installed, walked by the other vendor's hardware.
@Suite struct X86_1_2_NestedPagingWalked {
    @Test(arguments: [UInt8(4), 5]) func `stores reach the host's pages, small and huge, logged and not`(
        levels: UInt8
    ) throws {
        let machine = TDPMachine(thp: true) {
            $0.format = .npt
            $0.levels = levels
            $0.cachesMMIO = true
        }
        try machine.slot(count: 520)
        for frame: UInt64 in [5, 515] { #expect(machine.cpu.write(frame, frame + 1) == .done(.stored)) }
        #expect(machine.cpu.read(5) == .done(.value(6)))
        #expect(machine.leaves().map(\.level) == [.page2M, .page4K])
        try machine.logging(true, count: 520)
        #expect(machine.cpu.write(6, 7) == .done(.stored))
        #expect(try machine.dirtyLog()[0] == 1 << 6)
        #expect(try machine.space.load(at(6)) == 7)
        // The second access meets a reserved bit.
        #expect(machine.cpu.read(900) == .ended(.emulate))
        #expect(machine.cpu.read(901) == .ended(.emulate))
        let taken = machine.statistics.pf_taken.load(ordering: .relaxed)
        #expect(machine.cpu.read(900) == .ended(.emulate))
        #expect(machine.statistics.pf_taken.load(ordering: .relaxed) == taken)
    }
}
