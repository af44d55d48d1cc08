import Audit
import Frames
import HostMemory
import Paging
import Synchronization
import Testing

@testable import GuestMemory

/// A driver whose fault calls back between KVM's snapshot and its lock: the window that the retry check closes.
private final class WindowDriver: DriverMapping, @unchecked Sendable {
    // Unchecked: tests call from one task.
    let frames: Range<HostFrame>
    var inWindow: () -> Void = {}
    init(_ host: Host) {
        frames = host.memory.allocateDeviceFrames(16)!
        super.init(name: "window", flags: .framesOfDevice)
        claim(frames)
    }
    override func fault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault {
        let answer = space.insertFrame(
            frames.lowerBound.advanced(by: vma.backingPage(of: address)), at: address, in: vma)
        inWindow()
        return answer
    }
}

@Suite struct I6_NoStaleEntryTDP {
    private func machine() throws -> (TDPMachine, WindowDriver) {
        let machine = TDPMachine(deviceFrames: 16)
        let driver = WindowDriver(machine.test.host)
        try machine.slot(count: 16, backing: .driver(driver))
        return (machine, driver)
    }

    @Test func `an invalidation between snapshot and lock, begun and ended, is refused`() throws {
        let (machine, driver) = try machine()
        driver.inWindow = {
            machine.start(3..<4)
            machine.end(3..<4)
        }
        #expect(machine.fault(.write, 3) == .retry)
        #expect(machine.leaves().isEmpty)
        driver.inWindow = {}
        #expect(machine.fault(.write, 3) == .fixed)
    }

    @Test func `one that has begun and covers the frame is refused until it ends`() throws {
        let (machine, driver) = try machine()
        driver.inWindow = { machine.start(3..<5) }
        #expect(machine.fault(.write, 3) == .retry)
        driver.inWindow = {}
        #expect(machine.fault(.write, 4) == .retry)
        // Ranged: what it does not cover goes on.
        #expect(machine.fault(.write, 5) == .fixed)
        machine.end(3..<5)
        #expect(machine.fault(.write, 3) == .fixed)
    }

    @Test func `one that ended elsewhere is refused too, for the count has moved`() throws {
        let (machine, driver) = try machine()
        driver.inWindow = {
            machine.start(9..<10)
            machine.end(9..<10)
        }
        #expect(machine.fault(.write, 3) == .retry)
    }

    private func permits(_ guardian: borrowing MMUGuard, _ faulted: borrowing FaultedFrame) -> Bool {
        guardian.check(faulted) != nil
    }

    /// The check under the lock, with the one before it out of the way.
    @Test func `the check under the lock alone would do`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 16)
        machine.mmu.loadRoot(machine.cpu)
        let slot = machine.vm.activeSlots[0]
        machine.vm.withSlots {
            let snapshot = machine.vm.snapshot()
            guard
                case .frame(let faulted) = machine.vm.faultIn(
                    GuestFrame(3), slot: slot, write: true, snapshot: snapshot)
            else {
                Issue.record("the page can be found")
                return
            }
            machine.start(3..<4)
            machine.end(3..<4)
            let guardian = machine.vm.lockMMUForFault()
            let permitted = permits(guardian, faulted)
            #expect(!permitted)
            faulted.finish(.unused, holding: guardian)
            guardian.unlock()
        }
        #expect(machine.journal.holdings.isEmpty)
    }

    @Test func `a refused fault leaves the page as it was (X7)`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 16)
        try machine.space.store(at(3), 1)
        let frame = machine.space.translate(at(3))!.frame
        machine.start(3..<4)
        #expect(machine.fault(.write, 3) == .retry)
        machine.end(3..<4)
        let state = machine.test.state(frame)
        #expect(!state.flags.isAccessed(by: .kvm) && !state.flags.isDirty(by: .kvm))
        #expect(machine.journal.holdings.isEmpty)
    }

    @Test func `so does a fault that ends in a retry under the lock (X7)`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 16)
        try machine.space.store(at(3), 1)
        machine.fault(.write, 4)
        // The entry is being removed by somebody else.
        machine.word(3).store(EntryBit.frozen)
        #expect(machine.fault(.write, 3) == .retry)
        machine.word(3).store(EntryBit.empty)
        let state = machine.test.state(machine.space.translate(at(3))!.frame)
        #expect(!state.flags.isAccessed(by: .kvm) && !state.flags.isDirty(by: .kvm))
        #expect(state.referenceCount == 1 && machine.journal.holdings.isEmpty)
    }

    @Test func `when the start returns, no entry and no TLB maps the range (X11)`() throws {
        let machine = TDPMachine(cpus: 2)
        try machine.slot(count: 16)
        for cpu in machine.cpus { for frame in UInt64(0)..<16 { cpu.write(frame, frame) } }
        let flushes = machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed)
        machine.start(4..<8)
        #expect(machine.leaves().map(\.guestFrame.number) == Array(0..<4) + Array(8..<16))
        #expect(machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed) == flushes + 1)
        for cpu in machine.cpus {
            #expect(cpu.once { $0.load(GuestFrame(5).address) } != .value(5))
            #expect(cpu.once { $0.load(GuestFrame(3).address) } == .value(3))
        }
        machine.end(4..<8)
    }

    @Test func `a range without entries costs no flush`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 16)
        machine.fault(.write, 1)
        let flushes = machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed)
        machine.start(4..<8)
        machine.end(4..<8)
        #expect(machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed) == flushes)
    }

    @Test func `a huge leaf goes whole`() throws {
        let machine = TDPMachine(thp: true)
        try machine.slot(count: 1024)
        machine.fault(.write, 5)
        machine.start(7..<8)
        machine.end(7..<8)
        #expect(machine.leaves().isEmpty)
    }

    @Test func `after munmap the guest reads nothing of the old page`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 16)
        machine.cpu.write(3, 77)
        try machine.space.unmap(pages(3..<4))
        try machine.space.mapPages(3, 1)
        #expect(machine.cpu.read(3) == .done(.value(0)))
    }
}
