import Audit
import Frames
import Testing

@testable import GuestMemory
@testable import Paging

/// Entries that say "no memory here", and when they are believed. Spec: x86 1.5, 2.7, 2.8, X18, X27.
@Suite struct X86_1_5_MMIOEntries {
    static let formats = [TDPConfiguration.Format.ept, .npt]

    private func machine(_ format: TDPConfiguration.Format = .ept, spaces: Int = 1) -> TDPMachine {
        TDPMachine {
            $0.format = format
            $0.cachesMMIO = true
            $0.addressSpaces = spaces
        }
    }
    private func created(_ machine: TDPMachine) -> UInt64 {
        machine.statistics.pf_mmio_spte_created.load(ordering: .relaxed)
    }
    private func taken(_ machine: TDPMachine) -> UInt64 { machine.statistics.pf_taken.load(ordering: .relaxed) }
    /// The number of the slots' update, as if there had been that many.
    private func setGeneration(_ machine: TDPMachine, _ generation: UInt64) {
        machine.vm.slotSets[0].active.generation.store(generation, ordering: .relaxed)
        machine.vm.slotSets[0].inactive.generation.store(generation, ordering: .relaxed)
    }

    @Test func `the bits of EPT's form and of nested paging's`() {
        let machine = machine()
        setGeneration(machine, 0x5a5a5)
        #expect(machine.fault(.write, 7) == .emulate)
        // 110; gen 7:0 in 10:3, gen 18:8 in 62:52; the address.
        #expect(machine.word(7).load() == 0x6 | 0xa5 << 3 | 0x5a5 << 52 | 7 << 12)
        let other = self.machine(.npt)
        setGeneration(other, 0x5a5a5)
        #expect(other.fault(.write, 7) == .emulate)
        #expect(other.word(7).load() == 0x7 | 1 << 51 | 0xa5 << 3 | 0x5a5 << 52 | 7 << 12)
    }

    @Test(arguments: formats)
    func `where a processor speculates through it, an entry is beyond its cache and comes back whole`(
        format: TDPConfiguration.Format
    ) {
        for width in [32, 36, 39, 44, 46] as [UInt64] {
            var configuration = TDPConfiguration()
            configuration.format = format
            configuration.cacheAddressBits = width
            let bits = configuration.entryBits
            #expect(bits.unreachable.nonzeroBitCount == 5 && bits.unreachable >> width == 0)
            for address in stride(from: UInt64(12), to: 46, by: 1).map({ UInt64(1) << $0 }) + [0, 0x3fff_ffff_f000] {
                let frame = GuestAddress(address & ((1 << width) - 1)).frame
                let entry = bits.mmioEntry(frame, generation: 0x7_ffff, .all)
                #expect(entry & bits.unreachable == bits.unreachable && bits.frame(ofMMIO: entry) == frame)
                #expect(bits.isMMIO(entry) && EntryBits.generation(ofMMIO: entry) == 0x7_ffff)
            }
        }
        let machine = TDPMachine {
            $0.format = format
            $0.cachesMMIO = true
            $0.cacheAddressBits = 36
            $0.physicalAddressBits = 36
        }
        #expect(machine.fault(.read, 9) == .emulate)
        #expect(machine.word(9).load() & 0xf_8000_0000 == 0xf_8000_0000)
        #expect(machine.fault(.read, 9, reserved: true) == .emulate)
        #expect(taken(machine) == 1)
    }

    @Test(arguments: formats)
    func `every generation comes back, and neither bit 11 nor bit 63 is ever set`(format: TDPConfiguration.Format) {
        let bits = format == .ept ? EntryBits.ept() : .legacy
        for generation in stride(from: UInt64(0), to: 1 << 19, by: 1) {
            let entry = bits.mmioEntry(GuestFrame(0x3_1234_5678), generation: generation | 1 << 63, .all)
            guard EntryBits.generation(ofMMIO: entry) == generation, !EntryBits.isPresent(entry), entry >> 63 == 0,
                bits.isMMIO(entry), bits.frame(ofMMIO: entry) == GuestFrame(0x3_1234_5678)
            else {
                Issue.record("generation \(generation)")
                return
            }
        }
        #expect(!bits.isMMIO(EntryBits.empty) && !bits.isMMIO(EntryBits.frozen))
    }

    @Test(arguments: formats)
    func `the next access finds the entry and is no fault any more`(format: TDPConfiguration.Format) {
        let machine = machine(format)
        #expect(machine.fault(.read, 9) == .emulate)
        #expect(created(machine) == 1 && taken(machine) == 1)
        #expect(machine.fault(.write, 9, present: true, reserved: true) == .emulate)
        // Another address in between: the vCPU remembers one only, the entry does the rest.
        #expect(machine.fault(.read, 10) == .emulate)
        #expect(machine.fault(.read, 9, present: true, reserved: true) == .emulate)
        #expect(created(machine) == 2 && taken(machine) == 2)
        #expect(machine.events(.mmioChecked).count == 1)
        #expect(machine.leaves().isEmpty)
    }

    @Test func `hardware takes it for a misconfiguration`() {
        let machine = machine()
        #expect(machine.cpu.read(9) == .ended(.emulate))
        #expect(taken(machine) == 1)
        #expect(machine.cpu.read(9) == .ended(.emulate))
        #expect(taken(machine) == 1)
    }

    @Test func `a new slot makes the entry stale, and memory appears`() throws {
        let machine = machine()
        #expect(machine.fault(.read, 1) == .emulate)
        let entry = machine.word(1).load()
        try machine.slot(count: 4)
        // Nobody looks for it.
        #expect(machine.word(1).load() == entry)
        #expect(machine.cpu.write(1, 5) == .done(.stored))
        #expect(try machine.space.load(at(1)) == 5)
        #expect(machine.leaves().count == 1)
    }

    @Test func `a stale entry without a slot is written anew`() throws {
        let machine = machine()
        #expect(machine.fault(.read, 100) == .emulate)
        let entry = machine.word(100).load()
        try machine.slot(count: 4)
        #expect(machine.fault(.read, 100, reserved: true) == .emulate)
        #expect(machine.word(100).load() != entry)
        #expect(created(machine) == 2 && taken(machine) == 2)
    }

    @Test func `while slots change nothing is believed and the vCPU remembers nothing (X27)`() {
        let machine = machine()
        #expect(machine.fault(.read, 9) == .emulate)
        #expect(machine.fault(.read, 8) == .emulate)
        setGeneration(machine, 1 << 63)
        #expect(machine.fault(.read, 9, reserved: true) == .emulate)
        #expect(taken(machine) == 3, "the entry was not taken for good")
        #expect(machine.fault(.read, 9, reserved: true) == .emulate)
        #expect(taken(machine) == 4)
        // Bit 63 is in no entry.
        #expect(machine.word(9).load() == 0x6 | 9 << 12)
        setGeneration(machine, 0)
    }

    @Test(arguments: [1, 2]) func `when the 19 bits begin anew everything goes`(spaces: Int) throws {
        let machine = machine(spaces: spaces)
        #expect(machine.fault(.read, 9) == .emulate)
        setGeneration(machine, 1 << 19 - UInt64(2 * spaces))
        try machine.slot(count: 4)
        #expect(machine.cpu.hasRequest == false)
        try machine.slot(1, frame: 50, page: 50, count: 1)
        #expect(machine.vm.slotsGeneration == 1 << 19)
        #expect(machine.cpu.hasRequest, "the root is obsolete")
        machine.cpu.enterGuest()
        machine.cpu.exitGuest()
        // Generation 0 again: the entry would be believed.
        #expect(machine.word(9, level: 4).load() == EntryBit.empty)
        #expect(machine.fault(.read, 9) == .emulate)
        #expect(created(machine) == 2)
    }

    @Test func `a frame beyond the processor's addresses gets no entry`() {
        let machine = machine()
        #expect(machine.fault(.read, 1 << 34) == .emulate)
        #expect(machine.fault(.read, (1 << 34) - 1) == .emulate)
        #expect(created(machine) == 1)
    }

    @Test func `nested paging with 52 address bits has no bit to spare`() {
        let machine = TDPMachine {
            $0.format = .npt
            $0.cachesMMIO = true
            $0.physicalAddressBits = 52
        }
        #expect(machine.fault(.read, 9) == .emulate)
        #expect(created(machine) == 0)
    }

    @Test func `a reserved bit that is not KVM's is an error, a changed entry a new try`() throws {
        let machine = machine()
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        #expect(machine.fault(.read, 1, reserved: true) == .retry)
        let word = machine.word(1)
        let old = word.load()
        word.store(old | 1 << 47)
        #expect(machine.fault(.read, 1, reserved: true) == .failed(.EINVAL))
        word.store(old)
    }

    @Test func `a frozen entry is left alone`() {
        let machine = machine()
        #expect(machine.fault(.read, 1) == .emulate)
        let old = machine.word(2).exchange(EntryBit.frozen)
        #expect(machine.fault(.read, 2) == .retry)
        machine.word(2).store(old)
    }

    @Test func `tables of nothing but MMIO entries go with their root`() throws {
        let machine = machine()
        let free = machine.test.memory.freeFrames
        try machine.slot(count: 4)
        #expect(machine.fault(.read, 5000) == .emulate)
        try machine.set(count: 0, SlotFlags())
        machine.cpu.enterGuest()
        machine.cpu.exitGuest()
        machine.mmu.flushAll()
        machine.cpu.enterGuest()
        machine.cpu.exitGuest()
        // The new root is all that is left.
        #expect(machine.test.memory.freeFrames >= free - 2)
    }

    @Test func `a valid marker over a slot, and one for another frame, are found (X27)`() throws {
        let machine = machine()
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        let bits = EntryBits.ept()
        let now = machine.vm.slotsGeneration
        machine.word(2).store(bits.mmioEntry(GuestFrame(2), generation: now, .all))
        #expect(machine.mmu.checkTables().map(\.invariant) == [.x27])
        machine.word(2).store(bits.mmioEntry(GuestFrame(2), generation: now - 1, .all))
        #expect(machine.mmu.checkTables() == [])
        machine.word(2).store(bits.mmioEntry(GuestFrame(3), generation: now - 1, .all))
        #expect(machine.mmu.checkTables().map(\.invariant) == [.x27])
        machine.word(2).store(EntryBit.empty)
    }
}
