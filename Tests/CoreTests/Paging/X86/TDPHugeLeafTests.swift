import Frames
import HostMemory
import Paging
import Synchronization
import Testing

@testable import GuestMemory

/// Device memory that is mapped by 2 MiB entries when it is mapped at all.
private final class HugeWindow: DriverMapping, @unchecked Sendable {
    // Unchecked: immutable.
    let frames: Range<HostFrame>
    init(_ host: Host) {
        frames = host.memory.allocateDeviceFrames(1024, alignment: .page2M)!
        super.init(name: "huge window", flags: .framesOfDevice)
        claim(frames)
    }
    override func mapped(_ space: AddressSpace, _ vma: VMAInfo) -> Errno? {
        for block in [0, 512] {
            let address = vma.range.lowerBound + UInt64(block) * pageSize
            _ = space.insertFrame(frames.lowerBound.advanced(by: block), at: address, in: vma, level: .page2M)
        }
        return nil
    }
}

@Suite struct X38_HugeLeaves {
    @Test func `a block that the slot covers only in part stays small`() throws {
        let machine = TDPMachine(thp: true)
        try machine.space.mapPages(0, 2048)
        try machine.slot(frame: 100, page: 100, count: 1400, backing: nil)
        for frame: UInt64 in [101, 700, 1450] { machine.fault(.write, frame) }
        #expect(machine.leaf(101)?.level == .page4K)
        #expect(machine.leaf(700)?.level == .page2M)
        #expect(machine.leaf(1450)?.level == .page4K)
    }

    @Test func `guest and user addresses that are not congruent stay small`() throws {
        let machine = TDPMachine(thp: true)
        try machine.space.mapPages(0, 2048)
        try machine.slot(frame: 0, page: 1, count: 1536, backing: nil)
        machine.fault(.write, 700)
        #expect(machine.leaf(700)?.level == .page4K)
        #expect(machine.leaf(700)?.frame == machine.space.translate(at(701))?.frame)
    }

    @Test func `a page that the host maps small stays small`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 1024)
        machine.fault(.write, 700)
        #expect(machine.leaf(700)?.level == .page4K)
    }

    @Test func `an MMU limited to 4 KiB stays small`() throws {
        let machine = TDPMachine(mmu: TDPMMU(largestPage: .page4K), thp: true)
        try machine.slot(count: 1024)
        machine.fault(.write, 700)
        #expect(machine.leaf(700)?.level == .page4K)
    }

    @Test func `device memory mapped huge is mapped huge, and uncached`() throws {
        let machine = TDPMachine(deviceFrames: 2048)
        try machine.slot(count: 1024, backing: .driver(HugeWindow(machine.test.host)))
        #expect(machine.fault(.write, 700) == .fixed)
        #expect(machine.leaf(700)?.level == .page2M)
        #expect((machine.leaf(700)?.entry ?? ~0) & 0x78 == 0)
    }

    @Test func `a huge leaf takes an empty table's place, with a flush, and the table is freed`() throws {
        let machine = TDPMachine(thp: true)
        try machine.slot(count: 1024)
        try machine.logging(true, count: 1024)
        machine.fault(.write, 700)
        machine.start(512..<1024)
        machine.end(512..<1024)
        try machine.logging(false, count: 1024)
        #expect(machine.leaves().isEmpty)
        let table = HostFrame(machine.word(700, level: 2).load() >> 12 & 0xff_ffff_ffff)
        let flushes = machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed)
        #expect(machine.fault(.write, 700) == .fixed)
        #expect(machine.leaf(700)?.level == .page2M)
        #expect(machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed) == flushes + 1)
        expectFlushedBeforeFreed(machine, table)
    }
}

/// X30: unlinked by the huge leaf that took its place, removed, flushed, and only then freed.
private func expectFlushedBeforeFreed(_ machine: TDPMachine, _ table: HostFrame) {
    let events = machine.journal.events
    guard let unlinked = events.lastIndex(where: { $0.kind == .entryInstalled && $0.level == 2 }),
        let removed = events.lastIndex(where: { $0.kind == .tableRemoved && $0.frame == table.number }),
        let freed = events.lastIndex(where: { $0.kind == .pageFreed && $0.frame == table.number })
    else {
        Issue.record("the table was not replaced and freed")
        return
    }
    let flushed = events[unlinked...].firstIndex { $0.kind == .flush }
    #expect(unlinked < removed && removed < freed)
    #expect(flushed != nil && flushed! < freed)
}

@Suite struct X86_3_6_Splitting {
    @Test func `a fault below a huge leaf splits it: same memory, same bits, no flush`() throws {
        let machine = TDPMachine(thp: true)
        try machine.slot(count: 1024)
        machine.fault(.write, 700)
        let huge = try #require(machine.leaf(700))
        var manual = ManualProtect()
        manual.enabled = true
        manual.initiallySet = true
        try machine.vm.setManualProtect(manual)
        try machine.logging(true, count: 1024)
        let flushes = machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed)
        #expect(machine.fault(.write, 800) == .spurious)
        let leaves = machine.leaves()
        #expect(leaves.count == 512)
        for (i, leaf) in leaves.enumerated() {
            #expect(leaf.entry == (huge.entry & ~0x80) + UInt64(i) << 12)
        }
        #expect(machine.statistics.pages_4k.load(ordering: .relaxed) == 512)
        #expect(machine.statistics.pages_2m.load(ordering: .relaxed) == 0)
        #expect(machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed) == flushes)
    }
}

@Suite struct X86_3_10_RecoveringHugePages {
    /// A block of 4 KiB leaves over a huge host page.
    private func logged(_ policy: PolicyKind = .precise) throws -> TDPMachine {
        let machine = TDPMachine(policy: policy, thp: true)
        try machine.slot(count: 1024)
        try machine.logging(true, count: 1024)
        for frame in UInt64(512)..<1024 where frame % 3 == 0 { machine.fault(.write, frame) }
        return machine
    }

    @Test func `turning logging off puts one huge leaf in the table's place`() throws {
        let machine = try logged()
        let table = HostFrame(machine.word(700, level: 2).load() >> 12 & 0xff_ffff_ffff)
        let free = machine.test.memory.freeFrames
        try machine.logging(false, count: 1024)
        let leaf = try #require(machine.leaf(700))
        #expect(machine.leaves().count == 1 && leaf.level == .page2M)
        #expect(leaf.frame == machine.space.translate(at(512))?.frame)
        #expect(leaf.entry == 0x8600_0000_0000_0bf7 | leaf.frame.physicalAddress)
        #expect(machine.statistics.pages_4k.load(ordering: .relaxed) == 0)
        #expect(machine.statistics.pages_2m.load(ordering: .relaxed) == 1)
        #expect(machine.test.memory.freeFrames == free + 1)
        expectFlushedBeforeFreed(machine, table)
        #expect(machine.cpu.write(513, 8) == .done(.stored))
        #expect(try machine.space.load(at(513)) == 8)
    }

    @Test func `what was write-protected stays so, and the fast path gives W back`() throws {
        let machine = try logged()
        _ = try machine.dirtyLog()
        try machine.logging(false, count: 1024)
        #expect(machine.leaf(700)?.writable == false)
        #expect(machine.fault(.write, 700, present: true) == .fixed)
        #expect(machine.leaf(700)?.writable == true && machine.leaf(700)?.level == .page2M)
    }

    @Test func `an empty table stays`() throws {
        let machine = try logged()
        machine.start(512..<1024)
        machine.end(512..<1024)
        try machine.logging(false, count: 1024)
        #expect(machine.leaves().isEmpty)
        #expect(machine.events(.tableRemoved).isEmpty)
    }

    @Test func `a block whose host page is small stays`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 1024)
        try machine.logging(true, count: 1024)
        for frame in UInt64(512)..<1024 { machine.fault(.write, frame) }
        try machine.logging(false, count: 1024)
        #expect(machine.leaves().count == 512)
    }

    @Test func `nothing is recovered while an invalidation is under way (X12)`() throws {
        let machine = try logged()
        let slot = machine.vm.activeSlots[0]
        let plain = MemorySlot(
            id: slot.id, baseFrame: slot.baseFrame, pageCount: slot.pageCount, userAddress: slot.userAddress,
            flags: SlotFlags(), dirtyBitmap: nil, largePages: slot.largePages)
        machine.start(600..<601)
        #expect(machine.mmu.recoverHugePages(plain) == 0)
        machine.end(600..<601)
        #expect(machine.mmu.recoverHugePages(plain) == 1)
    }

    @Test(arguments: PolicyKind.allCases)
    func `only the old policies touch pages for it`(policy: PolicyKind) throws {
        let machine = try logged(policy)
        machine.test.memory.forgetAccessedAndDirty()
        try machine.logging(false, count: 1024)
        let state = machine.test.state(machine.leaf(700)!.frame)
        #expect(state.headFlags.isDirty(by: .kvm) == (policy != .precise))
        #expect(state.headFlags.isAccessed(by: .kvm) == (policy != .precise))
    }
}
