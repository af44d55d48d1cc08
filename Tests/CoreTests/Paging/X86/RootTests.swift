import Frames
import HostMemory
import Paging
import Synchronization
import Testing

@testable import GuestMemory

@Suite struct X33_X35_Roots {
    private func reload(_ machine: TDPMachine) {
        for cpu in machine.cpus {
            cpu.enterGuest()
            cpu.exitGuest()
        }
    }

    @Test func `vCPUs share one root, and each starts with an empty TLB`() throws {
        let machine = TDPMachine(cpus: 3)
        try machine.slot(count: 4)
        let free = machine.test.memory.freeFrames
        reload(machine)
        #expect(machine.test.memory.freeFrames == free - 1)
        #expect(Set(machine.cpus.map(\.root)).count == 1)
        #expect(machine.cpus.allSatisfy { $0.drops == 1 })
    }

    @Test func `deleting a slot makes the root obsolete; the old one goes with the last vCPU`() throws {
        let machine = TDPMachine(cpus: 2)
        try machine.slot(0, count: 4)
        try machine.slot(1, frame: 100, page: 100, count: 4)
        for cpu in machine.cpus { cpu.write(1, 1) }
        machine.cpu.write(100, 1)
        let old = try #require(machine.cpu.root)
        try machine.set(0, count: 0, SlotFlags())
        // I-21, and with the quirk every other slot's leaves too.
        #expect(machine.leaves().isEmpty)
        #expect(machine.cpus.allSatisfy { $0.root == old && $0.hasRequest })
        // X65: a fault on it is tried again, and the request that ends that is posted.
        #expect(machine.fault(.write, 100) == .retry)
        reload(machine)
        #expect(machine.cpus.allSatisfy { $0.root != nil && $0.root != old && $0.root == machine.cpu.root })
        #expect(machine.cpu.read(100) == .done(.value(1)))
        let freed = machine.events(.pageFreed).map(\.frame)
        #expect(freed.contains(old.number))
        #expect(machine.mmu.checkTables() == [])
    }

    @Test func `a deleted slot's memory is unreachable through any TLB`() throws {
        let machine = TDPMachine(cpus: 2)
        try machine.slot(count: 4)
        for cpu in machine.cpus { cpu.write(1, 5) }
        try machine.set(0, count: 0, SlotFlags())
        for cpu in machine.cpus { #expect(cpu.read(1) == .ended(.emulate)) }
    }

    @Test func `the other variant removes that slot's leaves only, keeps the root, and flushes`() throws {
        let machine = TDPMachine(mmu: TDPMMU(zapsOnlySlot: true))
        try machine.slot(0, count: 4)
        try machine.slot(1, frame: 100, page: 100, count: 4)
        machine.cpu.write(1, 5)
        machine.cpu.write(100, 6)
        let root = machine.cpu.root
        try machine.set(0, count: 0, SlotFlags())
        #expect(machine.leaves().map(\.guestFrame.number) == [100])
        #expect(machine.cpu.read(1) == .ended(.emulate))
        #expect(machine.cpu.root == root)
        #expect(machine.cpu.read(100) == .done(.value(6)))
    }

    @Test func `a moved slot is found at its new place`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        machine.cpu.write(1, 5)
        try machine.set(frame: 200, count: 4, SlotFlags())
        #expect(machine.cpu.read(1) == .ended(.emulate))
        #expect(machine.cpu.read(201) == .done(.value(5)))
    }

    @Test func `a notifier empties an invalid root too (X11, X34)`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 16)
        machine.fault(.write, 3)
        // Invalid, but not emptied yet: what the zapper sees between two batches.
        let root = machine.cpu.root!
        let words = machine.test.host.tableWords(root)
        machine.test.host.setTableWords(root, words.0 | 1 << 11, words.1)
        let flushes = machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed)
        machine.start(3..<4)
        machine.end(3..<4)
        #expect(machine.leaves().isEmpty)
        #expect(machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed) == flushes)
        machine.test.host.setTableWords(root, words.0, words.1)
    }

    @Test(arguments: PolicyKind.allCases)
    func `the end of the VM leaves nothing (I-28)`(policy: PolicyKind) throws {
        let test = TestHost(ramFrames: 4096, thp: true)
        let free = test.memory.freeFrames
        let space = test.space()
        let mmu = TDPMMU()
        let vm = VirtualMachine(addressSpace: space, mmu: mmu, policy: policy)
        let cpu = TDPCPU(number: 0, vm: vm, mmu: mmu)
        vm.add(cpu)
        try space.mapPages(0, 1600)
        try vm.setMemoryRegion(
            MemoryRegion(slot: 0, guestAddress: GuestAddress(0), size: 1600 * pageSize, userAddress: at(0)))
        for frame: UInt64 in [0, 700, 1024, 1590] { #expect(cpu.write(frame, frame) == .done(.stored)) }
        vm.destroy()
        #expect(vm.statistics.pages_4k.load(ordering: .relaxed) == 0)
        #expect(vm.statistics.pages_2m.load(ordering: .relaxed) == 0)
        space.exit()
        #expect(test.memory.freeFrames == free)
        #expect(test.journal.holdings.isEmpty)
    }

    @Test func `when the address space dies the guest can reach nothing`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        machine.cpu.write(1, 5)
        machine.space.exit()
        #expect(machine.leaves().isEmpty)
        #expect(machine.cpu.read(1) == .ended(.failed(.EFAULT)))
    }
}

@Suite struct X28_FrozenEntries {
    @Test(arguments: [UInt8(1), 2, 3, 4]) func `a fault that meets one tries again and leaves it`(level: UInt8) throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        let word = machine.word(1, level: level)
        let old = word.exchange(EntryBit.frozen)
        for access in AccessKind.allCases {
            #expect(machine.fault(access, 1) == .retry)
            #expect(machine.fault(access, 1, present: true) == .retry)
        }
        #expect(word.load() == EntryBit.frozen)
        word.store(old)
    }

    @Test func `a table that is removed ends frozen, all of it`() throws {
        let machine = TDPMachine(thp: true)
        try machine.slot(count: 512)
        try machine.logging(true, count: 512)
        machine.fault(.write, 3)
        let table = HostFrame(machine.word(3, level: 2).load() >> 12 & 0xff_ffff_ffff)
        try machine.logging(false, count: 512)
        let zapped = machine.events(.entryZapped).filter { $0.value == EntryBit.frozen }
        #expect(zapped.map(\.guest) == [3])
        // Freed, and not used again yet: its bytes still say it.
        for i in 0..<512 { #expect(machine.test.memory.entry(i, of: table).load() == EntryBit.frozen) }
    }
}
