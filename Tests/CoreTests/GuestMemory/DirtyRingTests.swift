import Audit
import Frames
import Machine
import Synchrony
import Testing

@testable import GuestMemory
@testable import HostMemory

extension TestGuest {
    /// A VM whose vCPUs have rings of 256 entries, the smallest there are: soft limit 192.
    static func withRings(
        _ architecture: Architecture = .x86TDP, bytes: UInt64 = pageSize, cpus: Int = 1, ramFrames: Int = 768,
        backup: Bool = false, keepsEvents: Bool = true
    ) -> TestGuest {
        TestGuest(architecture, ramFrames: ramFrames, cpus: cpus, keepsEvents: keepsEvents) { vm in
            #expect(throws: Never.self) {
                try vm.enableDirtyRings(bytes: bytes)
                guard backup else { return }
                vm.mmu.offersBackupBitmap = true
                try vm.enableBackupBitmap()
            }
        }
    }

    func ring(_ cpu: Int = 0) throws -> DirtyRing { try #require(cpus[cpu].ring) }

    /// The pages that a new reader finds in the ring, as offsets.
    func collect(_ reader: DirtyRingReader) -> [UInt64] { reader.collect().map(\.offset) }
}

/// Enabling, and the calls of the bitmap in a VM without one.
@Suite struct G5_6_EnablingDirtyRings {
    private func answer(_ vm: VirtualMachine, _ bytes: UInt64, _ capability: DirtyRingCapability = .acquireRelease)
        -> Errno?
    {
        do throws(Errno) {
            try vm.enableDirtyRings(bytes: bytes, capability)
            return nil
        } catch {
            return error
        }
    }

    @Test func `a size is a power of two, a page at least, and 65536 entries at most`() {
        let guest = TestGuest(cpus: 0)
        for bytes in [0, 1, 16, 1024, 2048, 4095, 4097, 4096 + 16, 3 * 4096] as [UInt64] {
            #expect(answer(guest.vm, bytes) == .EINVAL, "\(bytes)")
        }
        for bytes in [2 << 20, 1 << 31] as [UInt64] { #expect(answer(guest.vm, bytes) == .E2BIG, "\(bytes)") }
        #expect(answer(guest.vm, 1 << 32) == .EINVAL, "cut to 32 bits: 0")
        #expect(!guest.vm.usesDirtyRings)
        #expect(answer(guest.vm, 1 << 32 | 1 << 20) == nil, "cut to 32 bits")
        #expect(guest.vm.dirtyRings.bytes == 1 << 20)
    }

    @Test func `what is reserved must fit`() {
        let mmu = PoorMMU()
        mmu.logged = 512
        let host = TestHost(ramFrames: 64)
        let space = host.space()
        let vm = VirtualMachine(addressSpace: space, mmu: mmu)
        #expect(answer(vm, 8192) == .EINVAL, "576 entries are reserved")
        #expect(answer(vm, 16384) == nil)
        vm.destroy()
        space.exit()
    }

    @Test func `once, and before any vCPU`() {
        let guest = TestGuest(cpus: 0)
        #expect(answer(guest.vm, 4096) == nil && answer(guest.vm, 4096) == .EINVAL)
        #expect(answer(guest.vm, 2 << 20) == .E2BIG, "the size is looked at first")
        let late = TestGuest(cpus: 1)
        #expect(answer(late.vm, 4096) == .EINVAL && !late.vm.usesDirtyRings)
    }

    @Test func `each capability is offered where it may be used`() {
        let x86 = TestGuest(cpus: 0)
        #expect(x86.vm.largestDirtyRing(.totalStoreOrder) == 1 << 20)
        #expect(x86.vm.largestDirtyRing(.acquireRelease) == 1 << 20)
        #expect(answer(x86.vm, 4096, .totalStoreOrder) == nil)
        let riscv = TestGuest(.riscvSv39x4, cpus: 0)
        #expect(riscv.vm.largestDirtyRing(.totalStoreOrder) == 0)
        #expect(answer(riscv.vm, 4096, .totalStoreOrder) == .EINVAL)
        #expect(answer(riscv.vm, 4096) == nil)
        let mmu = PoorMMU()
        mmu.rings = false
        let host = TestHost(ramFrames: 64)
        let space = host.space()
        let vm = VirtualMachine(addressSpace: space, mmu: mmu)
        #expect(vm.largestDirtyRing(.acquireRelease) == 0 && answer(vm, 4096) == .EINVAL)
        vm.destroy()
        space.exit()
    }

    @Test func `a vCPU is made with its ring, or not at all`() throws {
        let guest = TestGuest(ramFrames: 96, cpus: 0)
        try guest.vm.enableDirtyRings(bytes: 64 * pageSize)
        let before = guest.test.memory.freeFrames
        let first = GuestCPU(number: 0, vm: guest.vm, tables: guest.tables)
        try guest.vm.create(first)
        #expect(guest.test.memory.freeFrames == before - 64)
        #expect(first.ring?.size == 16384 && first.ring?.softLimit == 16320 && first.ring?.used == 0)
        let second = GuestCPU(number: 1, vm: guest.vm, tables: guest.tables)
        #expect(throws: Errno.ENOMEM) { try guest.vm.create(second) }
        #expect(guest.test.memory.freeFrames == before - 64 && guest.vm.virtualCPUs.count == 1)
        guest.takeDown()
        #expect(guest.test.memory.freeFrames >= before && first.ring == nil)
    }

    @Test func `a VM with rings alone has no bitmap, and says so before anything else`() throws {
        let guest = TestGuest.withRings()
        try guest.addMemory(0, 4, log: true)
        #expect(!guest.vm.usesDirtyBitmaps && guest.vm.activeSlots[0].dirtyBitmap == nil)
        for id in [UInt32(0), 1, 0xffff] {
            #expect(throws: Errno.ENXIO) { try guest.vm.getDirtyLog(slot: id) }
            #expect(throws: Errno.ENXIO) { try guest.vm.clearDirtyLog(slot: id, firstPage: 1, pages: 9, bitmap: []) }
        }
    }

    @Test func `the backup bitmap wants the architecture, rings, and no slots`() throws {
        let plain = TestGuest(cpus: 0)
        #expect(throws: Errno.EINVAL) { try plain.vm.enableBackupBitmap() }
        plain.vm.mmu.offersBackupBitmap = true
        #expect(throws: Errno.EINVAL, "no rings") { try plain.vm.enableBackupBitmap() }
        try plain.vm.enableDirtyRings(bytes: 4096)
        try plain.addMemory(0, 1)
        #expect(throws: Errno.EINVAL, "a slot") { try plain.vm.enableBackupBitmap() }
        try plain.deleteSlot()
        try plain.vm.enableBackupBitmap()
        #expect(plain.vm.usesDirtyBitmaps && plain.vm.usesDirtyRings)
    }

    @Test func `a ring is mapped shared and not for execution`() throws {
        let guest = TestGuest.withRings()
        let plain = TestGuest()
        let cpu = guest.cpus[0]
        for (shared, executable) in [(false, false), (false, true), (true, true)] {
            #expect(throws: Errno.EINVAL) { try cpu.mapDirtyRing(shared: shared, executable: executable) }
        }
        #expect(try cpu.mapDirtyRing(shared: true, executable: false) === cpu.ring)
        #expect(try plain.cpus[0].mapDirtyRing(shared: false, executable: true) == nil, "there is none")
    }

    @Test func `resetting without rings is EINVAL`() {
        let guest = TestGuest()
        #expect(throws: Errno.EINVAL) { try guest.vm.resetDirtyRings() }
    }
}

/// An MMU that answers as it is told.
private final class PoorMMU: SecondaryMMU, @unchecked Sendable {
    // Unchecked: belongs to one test.
    var rings = true
    var logged: UInt32 = 0
    override var supportsDirtyRings: Bool { rings }
    override var hardwareLogEntries: UInt32 { logged }
}

/// What is pushed, harvested and reset.
@Suite struct G5_6_DirtyRings {
    @Test(arguments: Architecture.twoStage)
    func `a write is in its vCPU's ring, once, until the ring is reset`(architecture: Architecture) throws {
        let guest = TestGuest.withRings(architecture, cpus: 2)
        try guest.space.mapPages(0, 8)
        try guest.setSlot(3, guest: 1, pages: 7, host: 1, log: true)
        for page in [1, 5, 5, 2] { guest.store(page, 1) }
        guest.store(7, 1, cpu: 1)
        let first = DirtyRingReader(try guest.ring(0))
        let second = DirtyRingReader(try guest.ring(1))
        #expect(
            first.collect() == [0, 4, 1].map { DirtyRingEntry(flags: DirtyRingEntry.dirty, slot: 3, offset: $0) })
        #expect(guest.collect(second) == [6])
        #expect(guest.collect(first) == [], "each is read once")
        guest.store(5, 2)
        #expect(guest.collect(first) == [], "still writable, until the reset")
        #expect(try guest.vm.resetDirtyRings() == 4)
        #expect([1, 2, 5, 7].allSatisfy { guest.leaf($0)?.writable == false })
        #expect(try guest.ring(0).used == 0 && guest.ring(0).entry(at: 0).flags == 0)
        guest.store(5, 3)
        guest.store(5, 4, cpu: 1)
        #expect(guest.collect(first) == [4])
        #expect(guest.collect(second) == [], "another vCPU's first write has made it writable")
        guest.check()
        #expect(try guest.vm.resetDirtyRings() == 1 && guest.vm.resetDirtyRings() == 0)
        guest.check()
    }

    @Test func `an entry names the address space in its high half`() throws {
        let guest = TestGuest(ramFrames: 768, addressSpaces: 2) { vm in
            #expect(throws: Never.self) { try vm.enableDirtyRings(bytes: pageSize) }
        }
        try guest.space.mapPages(0, 4)
        try guest.setSlot(1 << 16 | 5, guest: 0, pages: 4, log: true)
        guest.cpus[0].switchAddressSpace(to: 1)
        #expect(guest.store(2, 1) == .stored)
        let reader = DirtyRingReader(try guest.ring())
        #expect(reader.collect() == [DirtyRingEntry(flags: 1, slot: 1 << 16 | 5, offset: 2)])
        #expect(try guest.vm.resetDirtyRings() == 1)
        #expect(guest.leaf(2)?.writable == false)
    }

    @Test func `the reset flushes once, after slots_lock, and only if anything was reset`() throws {
        let guest = TestGuest.withRings()
        try guest.addMemory(0, 200, log: true)
        let flushes = { guest.test.events(.flush).count }
        let reader = DirtyRingReader(try guest.ring())
        for page in [0, 70, 140] { guest.store(page, 1) }
        var before = flushes()
        #expect(try guest.vm.resetDirtyRings() == 0 && flushes() == before, "nothing was marked")
        _ = reader.collect()
        before = flushes()
        #expect(try guest.vm.resetDirtyRings() == 3 && flushes() == before + 1, "three batches, one flush")
    }

    @Test func `a full ring keeps its vCPU out of the guest until it is reset`() throws {
        let guest = TestGuest.withRings()
        try guest.addMemory(0, 256, log: true)
        let ring = try guest.ring()
        for page in 0..<191 { #expect(guest.store(page, 7) == .stored) }
        #expect(ring.used == 191 && !ring.isSoftFull)
        #expect(guest.store(191, 7) == .dirtyRingFull, "its fault was served, and logged; the guest does not come back")
        #expect(ring.used == 192 && ring.isSoftFull && !ring.isFull)
        #expect(try guest.space.load(at(191)) == 0, "the access has not happened")
        for _ in 0..<3 { #expect(guest.store(191, 7) == .dirtyRingFull) }
        #expect(guest.load(0) == .dirtyRingFull, "whatever it wants to do")
        let reader = DirtyRingReader(ring)
        #expect(reader.collect(atMost: 1).count == 1)
        #expect(guest.store(191, 7) == .dirtyRingFull, "harvested is not reset")
        #expect(try guest.vm.resetDirtyRings() == 1)
        #expect(guest.store(191, 7) == .stored && guest.store(190, 8) == .stored)
        #expect(guest.store(0, 8) == .dirtyRingFull, "the next page is the one too many")
        #expect(guest.collect(reader) == (1..<192).map(UInt64.init) + [0])
        #expect(try guest.vm.resetDirtyRings() == 192)
        #expect(guest.store(0, 8) == .stored && ring.used == 1)
        guest.check()
    }

    @Test func `indices go on where 32 bits and the ring end`() throws {
        let guest = TestGuest.withRings()
        try guest.addMemory(0, 128, log: true)
        let reader = DirtyRingReader(try guest.ring())
        for round in 0..<20 {
            for page in 0..<100 { guest.store(page, UInt64(round)) }
            #expect(guest.collect(reader) == (0..<100).map(UInt64.init))
            #expect(try guest.vm.resetDirtyRings() == 100)
        }
        #expect(try guest.ring().progress.pushed == 2000)
    }

    @Test func `stores through the emulator and ends of host maps are the vCPU's too`() throws {
        let guest = TestGuest.withRings()
        try guest.addMemory(0, 4, log: true)
        let reader = DirtyRingReader(try guest.ring())
        try guest.vm.withSlots { () -> Result<Void, any Error> in
            Result { try guest.vm.map(gfn(2)).unmap(by: guest.cpus[0]) }
        }.get()
        #expect(guest.collect(reader) == [2])
        _ = try guest.vm.resetDirtyRings()
        try withUnsafeBytes(of: UInt64(6)) { try guest.cpus[0].writeGuest(gfn(3), from: $0) }
        #expect(guest.collect(reader) == [3], "a write of KVM for the vCPU")
        let buffer = try #require(GraphicsBuffer(guest.test.host, pages: 1, order: 0))
        try guest.space.mapPages(40, 1, .driver(buffer))
        try guest.setSlot(1, guest: 40, pages: 1, log: true)
        guest.store(40, 1)
        #expect(guest.collect(reader) == [0])
    }

    @Test func `a write without a vCPU is lost, and that is a finding; the backup bitmap has it`() throws {
        let guest = TestGuest.withRings()
        try guest.addMemory(0, 4, log: true)
        guest.vm.markDirty(gfn(1), in: guest.vm.activeSlots[0])
        #expect(try guest.ring().used == 0)
        #expect(guest.test.journal.findings.map(\.invariant) == [.i12])
        guest.expectedFindings = 1

        let backed = TestGuest.withRings(backup: true)
        try backed.addMemory(0, 130, log: true)
        backed.vm.markDirty(gfn(129), in: backed.vm.activeSlots[0])
        backed.store(3, 1)
        #expect(try backed.log() == [129], "only what no vCPU wrote")
        #expect(backed.collect(DirtyRingReader(try backed.ring())) == [3])
        try backed.vm.clearDirtyLog(slot: 0, firstPage: 0, pages: 130, bitmap: [~0, ~0, ~0])
        #expect(try backed.vm.resetDirtyRings() == 1)
        #expect(backed.leaf(3)?.writable == false)
    }

    @Test func `a vCPU of another VM logs nothing here`() throws {
        let guest = TestGuest.withRings()
        let other = TestGuest.withRings()
        try guest.addMemory(0, 4, log: true)
        guest.vm.markDirty(gfn(1), in: guest.vm.activeSlots[0], by: other.cpus[0])
        #expect(try guest.ring().used == 0 && other.ring().used == 0)
        #expect(guest.test.journal.findings.map(\.invariant) == [.i12])
        guest.expectedFindings = 1
    }

    @Test func `marking more than the ring holds is a finding, and memory stays whole`() throws {
        let guest = TestGuest.withRings()
        try guest.addMemory(0, 300, log: true)
        let slot = guest.vm.activeSlots[0]
        for page in 0..<257 { guest.vm.markDirty(gfn(page), in: slot, by: guest.cpus[0]) }
        #expect(guest.test.journal.findings.map(\.invariant) == [.i27])
        guest.expectedFindings = 1
    }
}

/// What userspace may write into the rings.
@Suite struct G5_6_ScribbledRings {
    @Test(arguments: [
        // Another address space, an identity beyond, no such slot; outside of the slot, also by a wrap-around.
        DirtyRingEntry(flags: 2, slot: 7 << 16, offset: 0), DirtyRingEntry(flags: 2, slot: 0xffff, offset: 0),
        DirtyRingEntry(flags: 3, slot: 2, offset: 0), DirtyRingEntry(flags: 2, slot: 0, offset: 8),
        DirtyRingEntry(flags: 2, slot: 0, offset: .max), DirtyRingEntry(flags: ~0, slot: .max, offset: .max - 7),
    ])
    func `an entry that points nowhere is consumed and protects nothing`(entry: DirtyRingEntry) throws {
        let guest = TestGuest.withRings()
        try guest.addMemory(0, 8, log: true)
        try guest.space.mapPages(10, 8)
        try guest.setSlot(1, guest: 10, pages: 8, log: true)
        for page in [0, 10, 11] { guest.store(page, 1) }
        let ring = try guest.ring()
        ring.scribble(entry, at: 0)
        for index in UInt32(1)..<3 { ring.setFlags(3, at: index) }
        #expect(try guest.vm.resetDirtyRings() == 3 && ring.used == 0)
        #expect(guest.leaf(0)?.writable == true)
        #expect(guest.leaf(10)?.writable == false && guest.leaf(11)?.writable == false)
    }

    @Test func `a batch that ends outside of the slot is left out whole`() throws {
        let guest = TestGuest.withRings()
        try guest.addMemory(0, 8, log: true)
        for page in [2, 3, 7] { guest.store(page, 1) }
        let ring = try guest.ring()
        ring.scribble(DirtyRingEntry(flags: 2, slot: 0, offset: 40), at: 2)
        for index in UInt32(0)..<2 { ring.setFlags(2, at: index) }
        #expect(try guest.vm.resetDirtyRings() == 3)
        #expect([2, 3, 7].allSatisfy { guest.leaf($0)?.writable == true })
    }

    @Test func `only marked entries in a row are consumed, and none that was not pushed`() throws {
        let guest = TestGuest.withRings()
        try guest.addMemory(0, 8, log: true)
        for page in 0..<4 { guest.store(page, 1) }
        let ring = try guest.ring()
        for index: UInt32 in [0, 1, 3] { ring.setFlags(2, at: index) }
        #expect(try guest.vm.resetDirtyRings() == 2 && ring.used == 2, "the third is not marked")
        ring.setFlags(2, at: 2)
        for index: UInt32 in 4..<256 { ring.scribble(DirtyRingEntry(flags: 2, slot: 0, offset: 1), at: index) }
        #expect(try guest.vm.resetDirtyRings() == 2 && ring.used == 0)
        #expect(guest.store(5, 1) == .stored && ring.used == 1)
        #expect(ring.entry(at: 4) == DirtyRingEntry(flags: 1, slot: 0, offset: 5))
    }
}

/// Batches: pages of one slot in a window of 64.
@Suite struct G5_6_ResetBatches {
    private func entry(_ offset: UInt64, slot: UInt32 = 0) -> DirtyRingEntry {
        DirtyRingEntry(flags: 2, slot: slot, offset: offset)
    }

    @Test func `every three offsets near each other give one batch exactly if they fit in 64`() {
        for a in stride(from: UInt64(60), to: 140, by: 9) {
            for b in stride(from: UInt64(0), to: 200, by: 3) {
                for c in stride(from: UInt64(1), to: 200, by: 7) { check([a, b, c]) }
            }
        }
    }

    private func check(_ offsets: [UInt64]) {
        var batch = RingBatch(entry(offsets[0]))
        var inside: Set<UInt64> = [offsets[0]]
        for offset in offsets.dropFirst() {
            let all = inside.union([offset])
            let fits = all.max()! - min(batch.first, offset) < 64
            guard batch.absorb(entry(offset)) == fits else {
                Issue.record("\(offsets)")
                return
            }
            if fits { inside = all }
        }
        let meant = Set((0..<64).filter { batch.mask >> UInt64($0) & 1 == 1 }.map { batch.first + UInt64($0) })
        if meant != inside { Issue.record("\(offsets): \(meant)") }
    }

    @Test func `another slot is another batch, and an empty batch takes nothing in`() {
        var batch = RingBatch(entry(5))
        let answers = [entry(5, slot: 1), entry(5, slot: 1 << 16), entry(5)].map { batch.absorb($0) }
        #expect(answers == [false, false, true] && batch.mask == 1)
        var empty = RingBatch()
        let taken = empty.absorb(entry(0))
        #expect(!taken)
    }
}
