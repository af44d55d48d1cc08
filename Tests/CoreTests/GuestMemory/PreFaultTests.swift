import Audit
import Frames
import Machine
import Paging
import Synchrony
import Testing

@testable import GuestMemory
@testable import HostMemory

extension TestGuest {
    /// KVM_PRE_FAULT_MEMORY of `count` pages; what is left, in pages, or the errno.
    func preFault(_ page: Int, _ count: Int, flags: UInt64 = 0) -> Result<Int, Errno> {
        let range = PreFaultRange(address: gfn(page).address, size: UInt64(count) * pageSize, flags: flags)
        do throws(Errno) {
            let rest = try vm.preFault(cpus[0], range)
            #expect(rest.address.value + rest.size == range.address.value + range.size)
            return .success(Int(rest.size / pageSize))
        } catch {
            return .failure(error)
        }
    }

    var entries: [UInt64] {
        var found: [UInt64] = []
        vm.mmu.forEachLeaf { found.append($0.entry) }
        return found
    }
}

@Suite struct G6_3_PreFault {
    @Test func `memory is mapped for reading, writable where that is free, and not accessed`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 8)
        for page in 0..<4 { try guest.space.store(at(page), 5) }
        let taken = guest.vm.statistics.pf_taken.load(ordering: .relaxed)
        #expect(guest.preFault(0, 8) == .success(0))
        for page in 0..<8 {
            let leaf = try #require(guest.leaf(page))
            #expect(!leaf.accessed && leaf.writable == (page < 4), "page \(page)")
        }
        let frame = try #require(guest.frame(0))
        #expect(guest.test.state(frame).flags.isDirty(by: .kvm), "host-writable, so the guest may write unseen")
        #expect(guest.vm.statistics.pf_taken.load(ordering: .relaxed) == taken, "no fault is counted")
        guest.check()
        #expect(guest.load(0) == .value(5) && guest.leaf(0)?.accessed == true, "the guest's own access sets A")
        #expect(guest.vm.statistics.pf_taken.load(ordering: .relaxed) == taken)
    }

    @Test func `an entry of a host without A and D is access-tracked`() throws {
        let test = TestHost()
        let space = test.space()
        let mmu = TDPMMU(accessDirty: false)
        let tables = StageTwoTables.tdp(mmu)
        let vm = VirtualMachine(addressSpace: space, mmu: mmu)
        let cpu = GuestCPU(number: 0, vm: vm, tables: tables)
        vm.add(cpu)
        try space.mapPages(0, 1)
        try space.store(at(0), 6)
        try vm.setMemoryRegion(
            MemoryRegion(
                slot: 0, flags: SlotFlags(logDirtyPages: true), guestAddress: gfn(0).address, size: pageSize,
                userAddress: at(0)))
        _ = try vm.preFault(cpu, PreFaultRange(address: gfn(0).address, size: pageSize))
        var leaf: StageTwoLeaf?
        mmu.forEachLeaf { leaf = $0 }
        #expect(leaf.map { $0.entry & 7 == 0 && !$0.accessed } == true)
        #expect(mmu.checkTables() == [])
        #expect(try vm.getDirtyLog(slot: 0) == [0], "it can't be written yet")
        _ = try vm.preFault(cpu, PreFaultRange(address: gfn(0).address, size: pageSize))
        var again: StageTwoLeaf?
        mmu.forEachLeaf { again = $0 }
        #expect(again == leaf, "and stays tracked")
        #expect(cpu.access(.read, gfn(0).address) == .value(6))
        #expect(cpu.access(.write, gfn(0).address, value: 7) == .stored)
        #expect(try vm.getDirtyLog(slot: 0) == [1])
        vm.destroy()
        space.exit()
    }

    @Test func `in a logged slot a page that comes out writable is logged`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 4, log: true)
        try guest.space.store(at(1), 1)
        #expect(guest.preFault(0, 4) == .success(0))
        #expect(guest.leaf(0)?.writable == false && guest.leaf(1)?.writable == true)
        #expect(try guest.log() == [1])
        let rings = TestGuest.withRings()
        try rings.addMemory(0, 4, log: true)
        try rings.space.store(at(2), 1)
        #expect(rings.preFault(0, 4) == .success(0))
        #expect(rings.collect(DirtyRingReader(try rings.ring())) == [2])
    }

    @Test func `a step ends where the mapping does`() throws {
        let guest = TestGuest(ramFrames: 4096, thp: true)
        try guest.addMemory(0, 1024)
        try guest.space.store(at(0), 1)
        try guest.space.store(at(600), 1)
        let snapshots = guest.test.events(.snapshot).count
        #expect(guest.preFault(5, 1019) == .success(0))
        #expect(guest.test.events(.snapshot).count == snapshots + 2, "two huge pages")
        #expect(guest.leafCount == 2 && guest.leaf(1023)?.level == .page2M && guest.leaf(1023)?.accessed == false)
    }

    @Test func `flags, an unaligned, an empty and a wrapping range are EINVAL`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 4)
        let answer = { (address: UInt64, size: UInt64, flags: UInt64) -> Errno? in
            do throws(Errno) {
                _ = try guest.vm.preFault(
                    guest.cpus[0], PreFaultRange(address: GuestAddress(address), size: size, flags: flags))
                return nil
            } catch {
                return error
            }
        }
        let base = gfn(0).address.value
        #expect(answer(base, pageSize, 1) == .EINVAL && answer(base, pageSize, 1 << 63) == .EINVAL)
        #expect(answer(base + 8, pageSize, 0) == .EINVAL && answer(base, pageSize + 8, 0) == .EINVAL)
        #expect(answer(base, 0, 0) == .EINVAL)
        #expect(answer(0 &- pageSize, pageSize, 0) == .EINVAL, "its end is 0")
        #expect(answer(base, 0 &- pageSize, 0) == .EINVAL)
        #expect(guest.leafCount == 0)
        #expect(answer(base, pageSize, 0) == nil)
    }

    @Test func `a hole in guest memory is ENOENT, but success after the first page`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 4)
        #expect(guest.preFault(4, 1) == .failure(.ENOENT))
        #expect(guest.preFault(2, 5) == .success(3))
        #expect(guest.preFault(4, 3) == .failure(.ENOENT))
    }

    @Test func `memory that the process has not is EFAULT`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 4)
        try guest.space.unmap(pages(2..<4))
        #expect(guest.preFault(2, 1) == .failure(.EFAULT) && guest.preFault(1, 2) == .success(1))
    }

    @Test func `a signal is EINTR before anything is done`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 4)
        guest.space.signals.pending = true
        #expect(guest.preFault(0, 4) == .failure(.EINTR) && guest.leafCount == 0)
        guest.space.signals.pending = false
        #expect(guest.preFault(0, 4) == .success(0))
    }

    @Test func `a signal ends what an invalidation holds up`() async throws {
        let guest = TestGuest()
        try guest.addMemory(0, 4)
        let invalidation = SteppedInvalidation(guest.space, 0..<1)
        invalidation.start()
        try await onThreads([
            { #expect(guest.preFault(0, 1) == .failure(.EINTR)) },
            {
                for _ in 0..<1000 { yieldProcessor() }
                guest.space.signals.pending = true
            },
        ])
        invalidation.end()
        guest.space.signals.pending = false
        #expect(guest.leafCount == 0 && guest.preFault(0, 1) == .success(0))
    }

    @Test func `poison is a signal: EINTR`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 2)
        try guest.space.store(at(0), 1)
        #expect(guest.test.host.poison(try #require(guest.frame(0))))
        #expect(guest.preFault(0, 1) == .failure(.EINTR))
    }

    @Test func `private memory is mapped as its attribute says; a broken page of it is EHWPOISON`() throws {
        let guest = PrivateGuest()
        let file = try guest.bound(4, private: 1..<4)
        #expect(guest.guest.preFault(0, 3) == .success(0))
        #expect(guest.guest.leaf(1)?.frame == file.frame(of: 1) && guest.guest.leaf(0)?.frame == guest.guest.frame(0))
        #expect(guest.guest.preFault(3, 1) == .success(0))
        #expect(guest.test.host.poison(try #require(file.frame(of: 3))))
        guest.brokenFrames = 1
        #expect(guest.guest.preFault(3, 1) == .failure(.EHWPOISON) && guest.guest.preFault(2, 2) == .success(1))
    }

    @Test func `a slot on its way out is EAGAIN at once, not a wait for its own caller`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 4)
        var answers: [Result<Int, Errno>] = []
        let mmu = guest.vm.mmu
        // Between the two swaps of a deletion, where the slot is INVALID, the MMU removes its entries.
        let interposer = Interposer(0) { answers.append(guest.preFault(0, 1)) }
        interposer.ignoring(.slots)
        interposer.mayFire = { guest.vm.slot(containing: gfn(0))?.isInvalid == true && mmu === guest.vm.mmu }
        try interposer.run { try guest.deleteSlot() }
        #expect(interposer.hasFired && answers == [.failure(.EAGAIN)])
        #expect(guest.preFault(0, 1) == .failure(.ENOENT))
    }

    @Test func `without memory for a table ENOMEM`() throws {
        let guest = TestGuest(ramFrames: 96)
        try guest.addMemory(0, 90)
        guest.store(0, 1)
        var page = 1
        while guest.test.memory.freeFrames > 0, (try? guest.space.store(at(page), 1)) != nil { page += 1 }
        try guest.space.mapPages(600, 1)
        try guest.setSlot(7, guest: 0x4_0000, pages: 1, host: 0)
        #expect(guest.preFault(0x4_0000, 1) == .failure(.ENOMEM))
    }

    @Test func `EOPNOTSUPP where the architecture has none, or forbids it`() throws {
        let riscv = TestGuest(.riscvSv39x4)
        try riscv.addMemory(0, 1)
        #expect(riscv.preFault(0, 1) == .failure(.EOPNOTSUPP))
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        guard case .tdp(let mmu) = guest.tables else { return }
        mmu.allowsPreFault = false
        #expect(guest.preFault(0, 1) == .failure(.EOPNOTSUPP))
    }

    @Test func `a page that must be read is waited for, never left to a worker`() throws {
        let guest = TestGuest()
        let object = try guest.addSlowMemory(2)
        guest.cpus[0].allowsAsyncFaults = true
        #expect(guest.preFault(0, 2) == .success(0))
        #expect(object.frame(of: 1) != nil && guest.cpus[0].asyncFaults.count == 0 && guest.leafCount == 2)
    }

    @Test func `an obsolete root is replaced, not faulted into for ever`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 4)
        #expect(guest.preFault(0, 1) == .success(0))
        try guest.space.mapPages(20, 1)
        try guest.setSlot(1, guest: 20, pages: 1)
        try guest.deleteSlot(1)
        #expect(guest.preFault(0, 4) == .success(0))
        #expect(guest.load(3) == .value(0))
        guest.check()
    }
}

/// Patch 05: a prefetch that meets an entry leaves it.
@Suite struct Patch05_PrefaultLeavesEntries {
    @Test func `twice is as good as once`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 8)
        for page in 0..<4 { try guest.space.store(at(page), 1) }
        #expect(guest.preFault(0, 8) == .success(0))
        let before = guest.entries
        #expect(guest.preFault(0, 8) == .success(0) && guest.entries == before)
    }

    @Test func `a young, a written and a write-protected entry stay as they are`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 3, log: true)
        for page in 0..<3 { guest.store(page, 1) }
        _ = try guest.log()
        guest.store(1, 2)
        let before = guest.entries
        #expect(guest.leaf(0)?.writable == false && guest.leaf(1)?.writable == true)
        #expect(guest.preFault(0, 3) == .success(0))
        #expect(guest.entries == before && guest.leaf(0)?.accessed == true)
        #expect(try guest.log() == [1], "nothing was made writable, so nothing more is logged")
    }

    @Test func `the answer of a worker comes too late: the guest's own entry stays`() throws {
        let guest = TestGuest(cpus: 2)
        _ = try guest.addSlowMemory(1, log: true)
        let cpu = guest.cpus[0]
        cpu.allowsAsyncFaults = true
        #expect(guest.handle(0) == .retry && guest.vm.asyncFaults.runOne())
        guest.store(0, 4, cpu: 1)
        let before = guest.entries
        let fixed = guest.vm.statistics.pf_fixed.load(ordering: .relaxed)
        #expect(cpu.enterGuest() == nil && guest.entries == before && before.count == 1)
        cpu.exitGuest()
        #expect(guest.vm.statistics.pf_fixed.load(ordering: .relaxed) == fixed)
        #expect(guest.leaf(0)?.accessed == true && guest.leaf(0)?.dirty == true)
    }

    @Test func `a write whose page was fetched adds no right to an entry that was protected meanwhile`() throws {
        try checkPatch(5) {
            let guest = TestGuest(cpus: 2)
            _ = try guest.addSlowMemory(1, log: true)
            let cpu = guest.cpus[0]
            cpu.allowsAsyncFaults = true
            #expect(guest.vm.withSlots { guest.vm.mmu.handleFault(cpu, guest.fault(0, .write)) } == .retry)
            #expect(guest.vm.asyncFaults.runOne())
            _ = guest.load(0, cpu: 1)
            #expect(try guest.log() == [0], "the read made it writable, and so logged")
            let before = guest.entries
            #expect(guest.leaf(0)?.writable == false)
            #expect(cpu.enterGuest() == nil && guest.entries == before)
            cpu.exitGuest()
            #expect(try guest.log() == [])
        }
    }

    @Test func `a table is not replaced by a huge entry: in 6_13 whatever is present ends a prefetch`() throws {
        try checkPatch(5) {
            let guest = TestGuest(ramFrames: 4096)
            try guest.addMemory(0, 512)
            for page in 0..<512 { guest.store(page, 1) }
            try guest.space.advise(pages(0..<512), .collapse)
            #expect(guest.leafCount == 0)
            #expect(guest.preFault(0, 512) == .success(0) && guest.leafCount == 0)
            #expect(guest.load(0) == .value(1) && guest.leaf(0)?.level == .page2M)
        }
    }

    @Test func `a huge entry is not split for small ones`() throws {
        let guest = TestGuest(ramFrames: 4096, thp: true)
        try guest.addMemory(0, 512)
        guest.store(0, 1)
        #expect(guest.leaf(9)?.level == .page2M)
        try guest.manual(initiallySet: true)
        try guest.setSlot(pages: 512, log: true)
        let before = guest.entries
        #expect(guest.preFault(9, 3) == .success(0))
        #expect(guest.entries == before && guest.leaf(9)?.level == .page2M)
    }
}

extension Patch16_NeedsIO {
    @Test(arguments: [false, true])
    func `a swapped page without waiting is NEEDS_IO, and nothing is held`(write: Bool) throws {
        let guest = TestGuest(swap: SwapDevice(slots: 16, slow: true))
        try guest.addMemory(0, 1)
        try guest.space.store(at(0), 1)
        try guest.space.advise(pages(0..<1), .pageOut)
        #expect(guest.faultIn(0, write: write, noWait: true) == .failed(.needsIO))
        #expect(guest.test.journal.holdings.isEmpty && guest.frame(0) == nil)
        #expect(guest.faultIn(0, write: write).error == nil)
    }

    @Test func `it never leaves the fault handler`() throws {
        for allowed in [false, true] {
            let guest = TestGuest(swap: SwapDevice(slots: 16, slow: true))
            try guest.addMemory(0, 4)
            guest.cpus[0].allowsAsyncFaults = allowed
            for page in 0..<4 { guest.store(page, UInt64(page)) }
            try guest.space.advise(pages(0..<4), .pageOut)
            for page in 0..<4 { #expect(guest.load(page) == .value(UInt64(page))) }
            let snapshots = guest.test.events(.translationFailed)
            #expect(snapshots.contains { TranslationError.allCases[Int($0.value)] == .needsIO })
            guest.check()
        }
    }
}
