import Audit
import Frames
import HostMemory
import Synchronization
import Synchrony
import Testing

@testable import GuestMemory
@testable import Paging

// What entries of x86 tables say, and what becomes of pages when they end.

@Suite struct Patch04_OnlyLeavesProveWritable {
    @Test func `a huge leaf that takes a table's place over a tracked frame can't be written`() throws {
        try checkPatch(4) {
            let machine = TDPMachine(thp: true) { $0.tracksWrites = true }
            try machine.slot(count: 1024)
            try machine.mmu.track(GuestFrame(701))
            machine.fault(.write, 702)
            #expect(machine.leaf(702)?.level == .page4K)
            // As if the counts had missed the frame: they alone keep a huge leaf from being tried.
            let counts = try #require(machine.vm.activeSlots[0].largePages)
            counts.add(-1, at: GuestFrame(701))
            #expect(machine.fault(.write, 701) == .writeProtected)
            counts.add(1, at: GuestFrame(701))
            #expect(machine.leaf(701)?.level == .page2M && machine.leaf(701)?.writable == false)
            #expect(machine.journal.findings.isEmpty)
        }
    }

    @Test func `an old leaf proves it, a link, an empty entry and a read-only leaf do not`() {
        let leaf = EntryBits.mmuPresent | EntryBits.write
        #expect(EntryBits.provesWritable(leaf, 1) && EntryBits.provesWritable(leaf | EntryBits.large, 2))
        #expect(!EntryBits.provesWritable(leaf, 2) && !EntryBits.provesWritable(EntryBits.write, 1))
        #expect(!EntryBits.provesWritable(EntryBits.mmuPresent, 1))
    }
}

/// Turned a parameter's sense round; the sense before can't be told from a caller's mistake.
@Suite struct Patch06_Synchronizing {
    @Test func `a fault may put a guest table out of sync, the guest's flush and a prefetch may not`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        #expect(guest.cpus[0].access(.load, at: 0x9000) == .value(0))
        let slot = guest.vm.activeSlots[0]
        func mayWrite(_ frame: UInt64, synchronizing: Bool, prefetch: Bool) -> Bool {
            guest.mmu.letGuestWrite(GuestFrame(frame), slot, synchronizing: synchronizing, prefetch: prefetch)
        }
        #expect(!mayWrite(4, synchronizing: true, prefetch: true) && !guest.page(4)!.isUnsync)
        #expect(!mayWrite(4, synchronizing: false, prefetch: true) && !guest.page(4)!.isUnsync)
        #expect(mayWrite(9, synchronizing: true, prefetch: true), "no table")
        #expect(mayWrite(4, synchronizing: false, prefetch: false) && guest.page(4)!.isUnsync)
        #expect(!mayWrite(4, synchronizing: true, prefetch: true), "out of sync is not enough for a flush")
        #expect(!mayWrite(3, synchronizing: false, prefetch: false), "above the lowest level")
    }
}

@Suite struct Patch07_SynchronisedIsAccessed {
    @Test(arguments: [false, true])
    func `an entry that is made anew for the guest's flush is young, even if it was old before`(all: Bool) throws {
        try checkPatch(7) {
            let guest = try PagedGuest()
            try guest.identityMap()
            let cpu = guest.cpus[0]
            #expect(cpu.access(.store(1), at: 0x9000) == .stored)
            #expect(cpu.access(.store(0x9027), at: 0x4000 + 9 * 8) == .stored)
            #expect(guest.space.clearYoung(pages(9..<10)))
            if all { cpu.flushAll() } else { cpu.flush(0x9000) }
            let entry = try #require(guest.mmu.leaf(of: cpu, at: 0x9000)?.entry)
            #expect(entry & ~EntryBits.frameMask == 0xa25, "A; W went with the guest's D")
            #expect(guest.test.journal.findings.isEmpty)
        }
    }
}

/// What happens to leaves, of which their pages hear nothing any more.
enum LeafEnd: CaseIterable, Sendable {
    case notifier, deletion, writeProtection, clearedDirty, ageing

    /// Whether the end takes the whole leaf.
    var isZap: Bool { self == .notifier || self == .deletion }

    func perform(_ machine: TDPMachine, _ count: Int) throws {
        switch self {
        case .notifier:
            machine.start(0..<count)
            machine.end(0..<count)
        case .deletion: try machine.set(count: 0, SlotFlags())
        case .writeProtection: machine.mmu.writeProtect(machine.vm.activeSlots[0])
        case .clearedDirty: machine.mmu.clearDirty(machine.vm.activeSlots[0])
        case .ageing: _ = machine.space.clearYoung(pages(0..<count))
        }
        if isZap { #expect(machine.leaves().isEmpty) } else { #expect(machine.leaves().count == count) }
    }

    /// 512 pages that the guest has written, and nothing in the journal of how they end.
    func check(_ kind: Event.Kind) throws {
        // Without A in hardware, ageing takes W, which was a sign of its own.
        let machine = TDPMachine { $0.accessDirty = self != .ageing }
        try machine.slot(count: 512)
        for frame in UInt64(0)..<512 { machine.fault(.write, frame) }
        let marks = machine.events(kind)
        #expect(marks.count == 512 && marks.allSatisfy { $0.holder == .guestFault }, "once, when mapped")
        machine.test.memory.forgetAccessedAndDirty()
        try perform(machine, 512)
        #expect(machine.events(kind).count == 512)
        #expect(machine.journal.findings.isEmpty)
    }
}

@Suite struct Patch08_DirtyWhenMapped {
    @Test(arguments: LeafEnd.allCases)
    func `a page is marked dirty when it is mapped, and not when its entry ends`(end: LeafEnd) throws {
        try checkPatch(8) { try end.check(.markedDirty) }
    }
}

/// In between, what a notifier took away was marked accessed; the suite of patch 82 is about that.
@Suite struct Patch09_AccessedByRange {
    @Test func `a slot's deletion marks nothing accessed`() throws {
        try checkPatch(9) { try LeafEnd.deletion.check(.markedAccessed) }
    }
}

@Suite struct Patch82_ZapMarksNothing {
    @Test func `a page is marked accessed when it is mapped, and not when a notifier takes it away`() throws {
        try checkPatch(82) { try LeafEnd.notifier.check(.markedAccessed) }
    }

    @Test(arguments: LeafEnd.allCases) func `nor at any other end`(end: LeafEnd) throws {
        try end.check(.markedAccessed)
    }
}
