import Audit
import Frames
import HostMemory
import Synchrony
import Testing

@testable import GuestMemory
@testable import Paging

/// How writes are seen: D and the processor's own log, or W; and huge leaves with and without eager splitting. Spec: x86
/// 3.8, F3x, X39, X43 to X47.
@Suite struct X86_3_8_LoggingModes {
    private func machine(thp: Bool = false, eager: Bool = true, cpus: Int = 1) -> TDPMachine {
        TDPMachine(thp: thp, cpus: cpus) {
            $0.modificationLogEntries = 512
            $0.eagerSplit = eager
        }
    }
    /// A store on a processor that logs.
    private func store(_ machine: TDPMachine, _ frame: UInt64) {
        #expect(machine.cpu.write(frame, 1) == .done(.stored))
    }

    @Test func `turning it on clears D and keeps W`() throws {
        let machine = machine()
        try machine.slot(count: 8)
        for frame in UInt64(0)..<8 { machine.fault(.write, frame) }
        try machine.logging(true, count: 8)
        #expect(machine.leaves().allSatisfy { !$0.dirty && $0.writable })
        #expect(try machine.dirtyLog() == [0])
    }

    @Test func `what the processor logs is in the slot's log after the exit (X45)`() throws {
        let machine = machine()
        try machine.slot(count: 8)
        for frame in UInt64(0)..<8 { machine.fault(.write, frame) }
        try machine.logging(true, count: 8)
        store(machine, 3)
        store(machine, 6)
        store(machine, 6)
        #expect(machine.mmu.checkTables() == [])
        #expect(try machine.dirtyLog() == [1 << 3 | 1 << 6])
        #expect(machine.leaves().allSatisfy { !$0.dirty && $0.writable })
        store(machine, 3)
        #expect(try machine.dirtyLog() == [1 << 3])
        #expect(machine.statistics.pf_fast.load(ordering: .relaxed) == 0)
    }

    @Test func `the newest entry is marked first, and a full log leaves the guest`() throws {
        let machine = machine()
        try machine.slot(count: 1024)
        for frame in UInt64(0)..<514 { machine.fault(.write, frame) }
        try machine.logging(true, count: 1024)
        machine.cpu.enterGuest()
        for frame in UInt64(0)..<512 {
            #expect(machine.cpu.port.store(GuestFrame(frame).address, 1) == .stored)
        }
        #expect(machine.cpu.port.store(GuestFrame(512).address, 1) == .fault(.modificationLogFull))
        #expect(machine.events(.dirtyLogged).isEmpty)
        #expect(machine.mmu.checkTables() == [], "what waits in the log is not lost")
        machine.cpu.exitGuest()
        #expect(machine.events(.dirtyLogged).map(\.guest) == (0..<512).reversed())
        store(machine, 512)
        #expect(machine.events(.dirtyLogged).map(\.guest).last == 512)
    }

    @Test func `a harvest makes the vCPUs leave the guest first (X43)`() async throws {
        let machine = machine()
        try machine.slot(count: 8)
        machine.fault(.write, 2)
        try machine.logging(true, count: 8)
        let cpu = machine.cpu
        cpu.enterGuest()
        #expect(cpu.port.store(GuestFrame(2).address, 1) == .stored)
        let vm = machine.vm
        // The vCPU sees the request, as its run loop does.
        try await onThreads([
            {
                while !cpu.hasRequest { yieldProcessor() }
                cpu.exitGuest()
            },
            // Whether it is in this report or in the next is a race, in the kernel too.
            {
                let report = try vm.getDirtyLog(slot: 0)
                #expect(report == [0] || report == [1 << 2])
            },
        ])
        let seen = machine.events(.dirtyHarvested).map(\.value).reduce(0, |)
        #expect(try seen | machine.dirtyLog()[0] == 1 << 2)
    }

    @Test func `the log is off without a logged slot and in a nested guest`() throws {
        let machine = machine()
        try machine.slot(count: 8)
        #expect(!machine.mmu.logsModifications(of: machine.cpu))
        try machine.logging(true, count: 8)
        #expect(machine.mmu.logsModifications(of: machine.cpu))
        machine.mmu.setGuestMode(true, of: machine.cpu)
        #expect(!machine.mmu.logsModifications(of: machine.cpu))
    }

    @Test func `a nested guest's leaves lose W, the others D (X46)`() throws {
        let machine = machine(cpus: 2)
        try machine.slot(count: 8)
        machine.mmu.setGuestMode(true, of: machine.cpus[1])
        for cpu in machine.cpus { machine.fault(.write, 1, cpu: cpu) }
        try machine.logging(true, count: 8)
        var leaves = machine.leaves()
        #expect(leaves.count == 2)
        #expect(leaves.filter(\.writable).map(\.dirty) == [false])
        #expect(leaves.filter { !$0.writable }.map { $0.entry >> 52 & 3 } == [2])
        // The nested guest writes: by the lockless path, which logs.
        #expect(machine.fault(.write, 1, present: true, cpu: machine.cpus[1]) == .fixed)
        #expect(try machine.dirtyLog() == [0b10])
        leaves = machine.leaves()
        #expect(leaves.filter(\.writable).count == 1, "a harvest treats them alike")
        #expect(machine.mmu.checkTables() == [])
    }

    @Test(arguments: [UInt32(0), 512]) func `without eager splitting huge leaves lose W, and a write splits`(
        entries: UInt32
    ) throws {
        let machine = TDPMachine(thp: true) {
            $0.modificationLogEntries = entries
            $0.eagerSplit = false
        }
        try machine.slot(count: 1024)
        machine.fault(.write, 700)
        try machine.logging(true, count: 1024)
        let huge = try #require(machine.leaf(700))
        #expect(huge.level == .page2M && !huge.writable && huge.entry & EntryBit.mmuWritable != 0)
        #expect(huge.dirty == (entries == 0))
        #expect(machine.fault(.write, 700, present: true) == .fixed)
        #expect(machine.leaves().count == 512)
        #expect(machine.leaves().filter(\.writable).map(\.guestFrame.number) == [700])
        #expect(try machine.dirtyLog()[10] == 1 << (700 - 640))
    }

    @Test func `clearing a bitmap that began all ones takes W and MW of huge leaves at the ends only (F3x)`() throws {
        let machine = TDPMachine(ramFrames: 8192, thp: true) { $0.eagerSplit = false }
        try machine.slot(count: 2048)
        for frame: UInt64 in [5, 600, 1100] { machine.fault(.write, frame) }
        var manual = ManualProtect()
        manual.enabled = true
        manual.initiallySet = true
        try machine.vm.setManualProtect(manual)
        try machine.logging(true, count: 2048)
        #expect(machine.leaves().allSatisfy { $0.writable && $0.level == .page2M })
        let flushes = machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed)
        try machine.vm.clearDirtyLog(slot: 0, firstPage: 512, pages: 64, bitmap: [1 << 3])
        #expect(machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed) == flushes + 1)
        let leaf = try #require(machine.leaf(600))
        #expect(!leaf.writable && leaf.entry & EntryBit.mmuWritable == 0 && leaf.entry & EntryBit.hostWritable != 0)
        #expect(machine.leaf(5)?.writable == true && machine.leaf(1100)?.writable == true)
        // A write finds its way all the same.
        #expect(machine.fault(.write, 515, present: true) == .fixed)
        #expect(machine.leaf(515)?.level == .page4K && machine.leaf(515)?.writable == true)
        #expect(machine.leaf(516)?.writable == false)
    }

    @Test func `a ring keeps room for what the processor has logged`() throws {
        let machine = machine()
        #expect(machine.mmu.hardwareLogEntries == 512)
        #expect(TDPMachine().mmu.hardwareLogEntries == 0)
    }

    @Test func `a page that was written and is in no log is found (X44, X45, X46)`() throws {
        for (entries, nested, expected) in [
            (UInt32(0), false, Invariant.x44), (512, false, .x45), (512, true, .x46),
        ] {
            let machine = TDPMachine { $0.modificationLogEntries = entries }
            try machine.slot(count: 8)
            machine.mmu.setGuestMode(nested, of: machine.cpu)
            machine.fault(.write, 1)
            try machine.logging(true, count: 8)
            #expect(machine.mmu.checkTables() == [])
            let word = machine.word(1)
            let old = word.fetchOr(expected == .x45 ? EntryBit.dirty : EntryBit.write)
            #expect(machine.mmu.checkTables().map(\.invariant) == [expected])
            word.store(old)
        }
    }
}
