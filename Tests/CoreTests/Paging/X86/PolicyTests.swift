import Audit
import Frames
import HostMemory
import Paging
import Synchronization
import Testing

@testable import GuestMemory

/// What a fault and a zap do to pages under each policy. Spec: x86 2.7 "finish", 3.12, generic 10.
@Suite struct I1_I4_I5_References {
    private func kvmMarks(_ machine: TDPMachine, _ frame: HostFrame) -> (accessed: Bool, dirty: Bool) {
        let flags = machine.test.state(frame).headFlags
        return (flags.isAccessed(by: .kvm), flags.isDirty(by: .kvm))
    }

    @Test(arguments: PolicyKind.allCases)
    func `a write fault, and the zap after it, on anonymous memory`(policy: PolicyKind) throws {
        let machine = TDPMachine(policy: policy)
        try machine.slot(count: 4)
        try machine.space.store(at(1), 5)
        machine.fault(.write, 1)
        let frame = machine.leaf(1)!.frame
        #expect(machine.journal.holdings.isEmpty)
        #expect(machine.test.state(frame).referenceCount == 1)
        #expect((machine.leaf(1)!.entry & EntryBit.counted != 0) == (policy == .tracked))
        // x86: the old policies mark dirty when the entry goes, the precise one when it comes.
        #expect(kvmMarks(machine, frame) == (true, policy == .precise))
        machine.test.memory.forgetAccessedAndDirty()
        machine.start(1..<2)
        machine.end(1..<2)
        #expect(machine.leaves().isEmpty)
        #expect(kvmMarks(machine, frame) == (policy != .precise, policy != .precise))
    }

    @Test(arguments: PolicyKind.allCases)
    func `a read fault on a page that the host may write (X5)`(policy: PolicyKind) throws {
        let machine = TDPMachine(policy: policy)
        try machine.slot(count: 4)
        try machine.space.store(at(1), 5)
        machine.fault(.read, 1)
        #expect(kvmMarks(machine, machine.leaf(1)!.frame) == (true, policy == .precise))
    }

    @Test(arguments: PolicyKind.allCases)
    func `a page that the host may only read is accessed, never dirty`(policy: PolicyKind) throws {
        let machine = TDPMachine(policy: policy)
        try machine.slot(count: 4)
        try machine.space.store(at(1), 5)
        try machine.space.protect(pages(0..<4), .read)
        machine.fault(.read, 1)
        let frame = machine.leaf(1)!.frame
        machine.start(1..<2)
        machine.end(1..<2)
        #expect(kvmMarks(machine, frame) == (true, false))
    }

    @Test(arguments: PolicyKind.allCases)
    func `the page of zeros is mapped and its flags are left alone (I-14)`(policy: PolicyKind) throws {
        let machine = TDPMachine(policy: policy)
        try machine.slot(count: 4)
        #expect(machine.fault(.read, 1) == .fixed)
        machine.start(1..<2)
        machine.end(1..<2)
        #expect(kvmMarks(machine, machine.test.host.zeroPage) == (false, false))
    }

    /// A driver's block of four pages, of which only the first is counted.
    @Test(arguments: PolicyKind.allCases)
    func `pages of a graphics buffer`(policy: PolicyKind) throws {
        let machine = TDPMachine(policy: policy)
        let buffer = try #require(GraphicsBuffer(machine.test.host, pages: 8, order: 2))
        try machine.slot(count: 8, backing: .driver(buffer))
        let head = try #require(buffer.frame(of: 4))
        let tail = try #require(buffer.frame(of: 5))
        #expect(machine.test.state(head).referenceCount == 1 && machine.test.state(tail).referenceCount == 0)

        #expect(machine.fault(.write, 4) == .fixed)
        #expect(machine.fault(.write, 5) == (policy == .guess ? .failed(.EFAULT) : .fixed))
        #expect((machine.leaf(4)!.entry & EntryBit.counted != 0) == (policy == .tracked))
        if policy != .guess { #expect(machine.leaf(5)!.entry & EntryBit.counted == 0) }
        #expect(machine.test.state(head).referenceCount == 1 && machine.test.state(tail).referenceCount == 0)
        #expect(machine.journal.holdings.isEmpty)

        machine.test.memory.forgetAccessedAndDirty()
        machine.start(0..<8)
        machine.end(0..<8)
        // X6: under the precise policy nobody ever touches a driver's page.
        #expect(kvmMarks(machine, head) == (policy != .precise, policy != .precise))
        #expect(kvmMarks(machine, tail) == (false, false))
        let own = machine.journal.findings.filter { $0.invariant != .i4 && $0.invariant != .i5 }
        #expect(own.isEmpty)
        if policy == .precise { #expect(machine.journal.findings.isEmpty) }
    }

    @Test func `a PFN mapping takes no reference, whatever stands behind it`() throws {
        let machine = TDPMachine(deviceFrames: 16)
        let buffer = try #require(GraphicsBuffer(machine.test.host, pages: 4, order: 2))
        let bar = try #require(DeviceBAR(machine.test.host, pages: 4, filling: .byFault))
        let carveOut = try #require(ReservedMemory(machine.test.host, pages: 4))
        try machine.slot(0, frame: 0, page: 0, count: 4, backing: .driver(buffer))
        try machine.slot(1, frame: 16, page: 16, count: 4, backing: .driver(bar))
        try machine.slot(2, frame: 32, page: 32, count: 4, backing: .driver(carveOut))
        let taken = machine.events(.referenceTaken).count
        for base: UInt64 in [0, 16, 32] {
            for frame in base..<base + 4 {
                #expect(machine.fault(.write, frame) == .fixed)
                #expect(machine.leaf(frame)?.frame == machine.space.translate(at(Int(frame)))?.frame)
            }
        }
        #expect(machine.events(.referenceTaken).count == taken)
        #expect(machine.events(.markedDirty).isEmpty && machine.events(.markedAccessed).isEmpty)
        #expect(machine.journal.findings.isEmpty)
    }

    @Test(arguments: PolicyKind.allCases)
    func `clearing W or D for the log marks pages under the old policies only (X4)`(policy: PolicyKind) throws {
        for bits in [true, false] {
            let machine = TDPMachine(policy: policy)
            try machine.slot(count: 4)
            machine.fault(.write, 1)
            let frame = machine.leaf(1)!.frame
            machine.test.memory.forgetAccessedAndDirty()
            let slot = machine.vm.activeSlots[0]
            if bits { machine.mmu.clearDirty(slot) } else { machine.mmu.writeProtect(slot) }
            #expect(kvmMarks(machine, frame) == (false, policy != .precise))
        }
    }

    @Test(arguments: PolicyKind.allCases)
    func `a slot's deletion marks what it removes under the old policies only`(policy: PolicyKind) throws {
        let machine = TDPMachine(policy: policy)
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        let frame = machine.leaf(1)!.frame
        machine.test.memory.forgetAccessedAndDirty()
        try machine.set(count: 0, SlotFlags())
        #expect(kvmMarks(machine, frame) == (policy != .precise, policy != .precise))
    }
}

@Suite struct X86_3_9_Ageing {
    private var page: Range<UserAddress> { pages(1..<2) }

    @Test func `A is cleared without a flush, and comes back with the next walk`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        machine.cpu.write(1, 5)
        let flushes = machine.events(.flush).count
        #expect(machine.space.testYoung(at(1)))
        #expect(machine.space.clearFlushYoung(page))
        #expect(!machine.space.testYoung(at(1)))
        #expect(!machine.space.clearYoung(page))
        #expect(machine.leaf(1)?.accessed == false && machine.leaf(1)?.writable == true)
        #expect(machine.events(.flush).count == flushes)
        // A stale TLB entry only means a missed access (F6).
        #expect(machine.cpu.read(1) == .done(.value(5)))
        #expect(!machine.space.testYoung(at(1)))
        machine.cpu.dropTranslations()
        #expect(machine.cpu.read(1) == .done(.value(5)))
        #expect(machine.space.testYoung(at(1)))
    }

    @Test func `without A in hardware rights are taken, kept aside, and given back by the fast path (X26)`() throws {
        let machine = TDPMachine(mmu: TDPMMU(accessDirty: false))
        try machine.slot(count: 4)
        machine.cpu.write(1, 5)
        let before = try #require(machine.leaf(1)).entry
        #expect(machine.space.clearYoung(page))
        let tracked = try #require(machine.leaf(1)).entry
        #expect(tracked == before & ~(7 | EntryBit.accessed) | 1 << 54 | 1 << 56)
        #expect(!machine.space.clearYoung(page))
        #expect(machine.leaf(1)?.entry == tracked)

        #expect(machine.fault(.read, 1) == .fixed)
        #expect(machine.statistics.pf_fast.load(ordering: .relaxed) == 1)
        #expect(machine.leaf(1)?.entry == before & ~EntryBit.write)
        #expect(machine.fault(.write, 1, present: true) == .fixed)
        #expect(machine.leaf(1)?.entry == before)
    }

    @Test func `a write to a tracked leaf of a logged slot is logged`() throws {
        let machine = TDPMachine(mmu: TDPMMU(accessDirty: false))
        try machine.slot(count: 4)
        machine.cpu.write(1, 5)
        try machine.logging(true, count: 4)
        _ = machine.space.clearYoung(page)
        machine.cpu.dropTranslations()
        #expect(machine.cpu.read(1) == .done(.value(5)))
        #expect(try machine.dirtyLog() == [0])
        #expect(machine.cpu.write(1, 6) == .done(.stored))
        #expect(try machine.dirtyLog() == [0b10])
    }

    @Test(arguments: PolicyKind.allCases)
    func `no page is touched; but the W that tracking takes is told to it by the old policies`(
        policy: PolicyKind
    ) throws {
        for accessDirty in [true, false] {
            let machine = TDPMachine(policy: policy, mmu: TDPMMU(accessDirty: accessDirty))
            try machine.slot(count: 4)
            machine.fault(.write, 1)
            let frame = machine.leaf(1)!.frame
            machine.test.memory.forgetAccessedAndDirty()
            #expect(machine.space.clearYoung(page))
            let flags = machine.test.state(frame).headFlags
            #expect(!flags.isAccessed(by: .kvm))
            #expect(flags.isDirty(by: .kvm) == (policy != .precise && !accessDirty))
        }
    }
}
