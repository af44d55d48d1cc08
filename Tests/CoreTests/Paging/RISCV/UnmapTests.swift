import Audit
import Frames
import GuestMemory
import Hardware
import HostMemory
import Paging
import Testing

/// Unmapping removes every leaf that intersects the range and no other, wherever the range begins. Spec: arches 2.3.
@Suite struct I6_RISCVUnmap {
    /// Where leaves lie around a boundary of tables: small ones in the first 2 MiB and in the third, a hole between.
    private static let mapped: [UInt64] = [0, 1, 510, 511, 1024, 1025, 1535]
    private static let edges: [UInt64] = [0, 1, 2, 510, 511, 512, 700, 1023, 1024, 1025, 1026, 1535, 1536]

    private func guest(_ mode: GStageMMU.Mode = .sv39x4, _ quirks: GStageQuirks = GStageQuirks()) throws -> RISCVGuest {
        let guest = RISCVGuest(mode, quirks: quirks, ramFrames: 8192)
        try guest.anonymous(count: 2048)
        return guest
    }

    @Test(arguments: GStageMMU.Mode.allCases)
    func `every range takes its leaves and leaves the others`(mode: GStageMMU.Mode) throws {
        let guest = try guest(mode)
        for (i, low) in Self.edges.enumerated() {
            for high in Self.edges[(i + 1)...] {
                for n in Self.mapped { guest.fault(n, .write) }
                guest.unmap(low..<high)
                let left = guest.leaves.map { $0.guestFrame.number - RISCVGuest.base }
                #expect(left == Self.mapped.filter { $0 < low || $0 >= high }, "\(low)..<\(high)")
            }
        }
        guest.expectSound()
        guest.end()
    }

    /// The baseline steps from an unaligned start in a hole over the first part of what follows it.
    @Test func `by quirk a range that starts in a hole misses what lies behind it`() throws {
        let guest = try guest(.sv39x4, GStageQuirks(unmapSkips: true))
        for n in Self.mapped { guest.fault(n, .write) }
        guest.unmap(700..<1536)
        let left = guest.leaves.map { $0.guestFrame.number - RISCVGuest.base }
        #expect(left == [0, 1, 510, 511, 1024, 1025], "700 + 512 is behind 1024 and 1025")
        guest.end()
    }

    @Test func `a huge leaf goes whole with any part of it`() throws {
        let ranges: [Range<UInt64>] = [512..<513, 1023..<1024, 700..<701, 500..<513, 1023..<1100, 0..<2048, 512..<1024]
        for range in ranges {
            let guest = RISCVGuest(ramFrames: 8192)
            try guest.anonymous(count: 2048, huge: true)
            for n in [UInt64(0), 512, 1024, 1536] { guest.fault(n, .write) }
            guest.unmap(range)
            let left = guest.leaves.map { $0.guestFrame.number - RISCVGuest.base }
            let blocks = [UInt64(0), 512, 1024, 1536]
            #expect(left == blocks.filter { $0 + 512 <= range.lowerBound || $0 >= range.upperBound })
            guest.expectSound()
            guest.end()
        }
    }

    @Test func `by quirk a huge leaf covered in part stays`() throws {
        let guest = RISCVGuest(quirks: GStageQuirks(unmapSkips: true))
        try guest.anonymous(count: 512, huge: true)
        guest.fault(0, .write)
        guest.unmap(17..<18)
        #expect(guest.leaves.count == 1)
        guest.unmap(0..<512)
        #expect(guest.leaves.isEmpty)
        guest.end()
    }

    /// C7: a table goes with its last leaf, and its parent with it, after a flush; the root stays.
    @Test(arguments: GStageMMU.Mode.allCases)
    func `tables go with their last leaf`(mode: GStageMMU.Mode) throws {
        let guest = try guest(mode)
        for n in Self.mapped { guest.fault(n, .write) }
        let free = guest.memory.freeFrames
        for (i, n) in Self.mapped.enumerated() {
            guest.unmap(n..<n + 1)
            let gone = [511: 1, 1535: Int(mode.levels) - 1][n] ?? 0
            let before = [0, 0, 0, 0, 1, 1, 1][i]
            #expect(guest.memory.freeFrames == free + before + gone, "after \(n)")
        }
        let events = guest.host.journal.events
        for i in events.indices where events[i].kind == .tableRemoved {
            let freed = events[i...].firstIndex { $0.kind == .pageFreed }!
            #expect(events[i..<freed].contains { $0.kind == .flush })
        }
        guest.expectSound()
        guest.end()
    }

    @Test func `a slot's leaves go with the slot, its neighbours' stay`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(0, count: 3, id: 0)
        try guest.anonymous(3, count: 3, id: 1)
        for n in 0..<6 { guest.fault(UInt64(n), .write) }
        try guest.vm.setMemoryRegion(
            MemoryRegion(slot: 0, guestAddress: RISCVGuest.frame(0).address, size: 0, userAddress: at(0)))
        #expect(guest.leaves.map { $0.guestFrame.number - RISCVGuest.base } == [3, 4, 5])
        #expect(guest.fault(0, .write) == .emulate)
        guest.expectSound()
        guest.end()
    }

    @Test func `the end of the process empties the tables`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 3)
        for n in 0..<3 { guest.fault(UInt64(n), .write) }
        guest.space.exit()
        #expect(guest.leaves.isEmpty)
        #expect(guest.fault(0, .write) == .failed(.EFAULT))
        guest.vm.destroy()
    }
}

/// A vCPU with the hart's own TLB, which it empties when it is told to.
private final class BufferedCPU: VirtualCPU, @unchecked Sendable {
    // Unchecked: one task.
    let buffer = TranslationBuffer(capacity: 64)
    override func dropTranslations() { buffer.invalidateAll() }

    func reach(_ frame: GuestFrame, _ access: AccessKind, _ mmu: GStageMMU) -> WalkResult {
        enterGuest()
        defer { exitGuest() }
        let walker = GStageWalker(memory: vm.memory, hgatp: mmu.hgatp, hardwareAD: true)
        return GuestPort(stage: .gStage(walker), buffer: buffer).translate(frame.address, access)
    }
}

@Suite struct RV7_FencedBeforeUnlock {
    /// In one task the journal is the order of things: whatever changes an entry is followed by a flush before the
    /// next thing that happens outside of mmu_lock.
    private func unfenced(_ guest: RISCVGuest) -> Int {
        var open = 0
        var missed = 0
        for event in guest.host.journal.events {
            switch event.kind {
            case .entryInstalled, .entryZapped: open += 1
            case .entryChanged where (event.value ^ event.extra) != 1 << 6 || event.value & 1 << 6 != 0: open += 1
            case .flush: open = 0
            case .faultResolved, .notifierEnd, .hostEntryCleared, .pageFreed, .dirtyHarvested, .dirtyCleared, .fault,
                .slotDeleted:
                if open > 0 { missed += 1 }
                open = 0
            default: break
            }
        }
        return missed
    }

    @Test func `every change is fenced before the lock is dropped`() throws {
        let guest = RISCVGuest(ramFrames: 8192)
        try guest.anonymous(count: 1024, huge: true)
        guest.fault(3, .write)
        guest.fault(600, .write)
        try guest.slot(0, 0, count: 1024, log: true)
        guest.fault(3, .write)
        guest.fault(700, .write)
        _ = try guest.vm.getDirtyLog(slot: 0)
        guest.fault(3, .write)
        try guest.space.advise(at(3)..<at(4), .dontNeed)
        try guest.space.protect(at(700)..<at(701), .read)
        _ = guest.age(0..<1024)
        guest.fault(4, .read)
        try guest.vm.setMemoryRegion(
            MemoryRegion(slot: 0, guestAddress: RISCVGuest.frame(0).address, size: 0, userAddress: at(0)))
        #expect(unfenced(guest) == 0)
        guest.end()
    }

    @Test func `no translation of a hart outlives its leaf or its W`() throws {
        let guest = RISCVGuest()
        let cpu = BufferedCPU(number: 1, vm: guest.vm)
        guest.vm.add(cpu)
        try guest.anonymous(count: 2)
        guest.fault(0, .write)
        guest.fault(1, .write)
        for n in [UInt64(0), 1] {
            #expect(cpu.reach(RISCVGuest.frame(n), .write, guest.mmu).translation != nil)
        }
        try guest.slot(0, 0, count: 2, log: true)
        #expect(cpu.reach(RISCVGuest.frame(0), .read, guest.mmu).translation?.writable == false)
        #expect(cpu.reach(RISCVGuest.frame(0), .write, guest.mmu).violation?.reason == .rights)
        guest.fault(0, .write)
        #expect(cpu.reach(RISCVGuest.frame(0), .write, guest.mmu).translation != nil)
        _ = try guest.vm.getDirtyLog(slot: 0)
        #expect(cpu.reach(RISCVGuest.frame(0), .write, guest.mmu).violation?.reason == .rights)
        try guest.space.advise(at(0)..<at(1), .dontNeed)
        #expect(cpu.reach(RISCVGuest.frame(0), .read, guest.mmu).violation?.reason == .absent)
        guest.end()
    }
}
