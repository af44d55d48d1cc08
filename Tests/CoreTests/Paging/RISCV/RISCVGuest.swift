import Audit
import Frames
import GuestMemory
import Hardware
import HostMemory
import Paging
import Synchrony
import Testing

/// A RISC-V VM on a test host, with one or more vCPUs whose faults the test plays.
final class RISCVGuest {
    let host: TestHost
    let space: AddressSpace
    let mmu: GStageMMU
    let vm: VirtualMachine
    let cpus: [VirtualCPU]
    var cpu: VirtualCPU { cpus[0] }
    private let framesBefore: Int

    /// The first guest frame of tests: 2 GiB, aligned to every leaf.
    static let base: UInt64 = 0x80000

    init(
        _ mode: GStageMMU.Mode = .sv39x4, policy: PolicyKind = .precise, hugePages: Bool = true,
        quirks: GStageQuirks = GStageQuirks(), ramFrames: Int = 4096, deviceFrames: Int = 0, cpus count: Int = 1
    ) {
        host = TestHost(ramFrames: ramFrames, deviceFrames: deviceFrames, thp: true)
        framesBefore = host.memory.freeFrames
        space = host.space()
        mmu = GStageMMU(mode: mode, usesHostHugePages: hugePages, quirks: quirks)
        vm = VirtualMachine(addressSpace: space, mmu: mmu, policy: policy)
        let vm = vm
        cpus = (0..<count).map { VirtualCPU(number: $0, vm: vm) }
        for cpu in cpus { vm.add(cpu) }
    }

    var memory: PhysicalMemory { host.memory }

    /// Slot `id` of `count` pages: test guest frame `frame` shows test page `page` of the process.
    func slot(
        _ id: UInt32 = 0, _ frame: UInt64 = 0, page: Int? = nil, count: Int, log: Bool = false, readOnly: Bool = false
    ) throws(Errno) {
        try vm.setMemoryRegion(
            MemoryRegion(
                slot: id, flags: SlotFlags(logDirtyPages: log, readOnly: readOnly),
                guestAddress: Self.frame(frame).address, size: UInt64(count) * pageSize,
                userAddress: at(page ?? Int(frame))))
    }

    /// Anonymous memory of `count` pages at guest frame `frame`, in small pages unless `huge`.
    func anonymous(
        _ frame: UInt64 = 0, count: Int, huge: Bool = false, log: Bool = false, readOnly: Bool = false, id: UInt32 = 0
    ) throws(Errno) {
        try space.mapPages(Int(frame), count)
        let range = at(Int(frame))..<at(Int(frame) + count)
        try space.advise(range, huge ? .hugePage : .noHugePage)
        try slot(id, frame, count: count, log: log, readOnly: readOnly)
    }

    /// Guest frame number `n` of the tests.
    static func frame(_ n: UInt64) -> GuestFrame { GuestFrame(base + n) }

    @discardableResult
    func fault(_ n: UInt64, _ access: AccessKind, on cpu: Int = 0) -> FaultOutcome {
        fault(frame: Self.frame(n), access, on: cpu)
    }

    @discardableResult
    func fault(frame: GuestFrame, _ access: AccessKind, on cpu: Int = 0) -> FaultOutcome {
        let fault = GuestFault(address: frame.address, access: access, entryPresent: false)
        return vm.withSlots { mmu.handleFault(cpus[cpu], fault) }
    }

    /// What hardware makes of the tables.
    func walk(_ n: UInt64, _ access: AccessKind, svadu: Bool = true) -> WalkResult {
        GStageWalker(memory: memory, hgatp: mmu.hgatp, hardwareAD: svadu).walk(Self.frame(n).address, access)
    }

    var leaves: [StageTwoLeaf] {
        var leaves: [StageTwoLeaf] = []
        mmu.forEachLeaf { leaves.append($0) }
        return leaves
    }

    func leaf(_ n: UInt64) -> StageTwoLeaf? {
        let frame = Self.frame(n)
        return leaves.first { $0.guestFrame <= frame && frame.number < $0.guestFrame.number + $0.level.frames }
    }

    /// Unmaps guest frames as a notifier would, through the MMU's own entry.
    func unmap(_ range: Range<UInt64>) {
        let guardian = vm.lockMMU()
        let flush = mmu.unmap(
            Self.frame(range.lowerBound)..<Self.frame(range.upperBound), in: 0, holding: guardian, mayBlock: false)
        if flush { vm.flushRemoteTLBs() }
        guardian.unlock()
    }

    /// Clears the A bits of guest frames; whether any was set.
    func age(_ range: Range<UInt64>) -> Bool {
        let guardian = vm.lockMMU()
        let frames = Self.frame(range.lowerBound)..<Self.frame(range.upperBound)
        let tested = mmu.testAge(frames, in: 0, holding: guardian)
        let young = mmu.age(frames, in: 0, holding: guardian)
        let left = mmu.testAge(frames, in: 0, holding: guardian)
        guardian.unlock()
        #expect(young == tested && !left)
        return young
    }

    func hostFrame(_ page: Int) -> HostFrame? { space.translate(at(page))?.frame }
    func flags(_ page: Int) -> PageFlags { host.state(hostFrame(page)!).headFlags }

    /// What must hold whenever nothing runs.
    func expectSound(_ location: SourceLocation = #_sourceLocation) {
        #expect(mmu.checkTables() == [], sourceLocation: location)
        #expect(host.journal.findings == [], sourceLocation: location)
        #expect(host.journal.holdings == [], sourceLocation: location)
        let small = leaves.filter { $0.level == .page4K }.count
        #expect(vm.statistics.pages_4k.load(ordering: .relaxed) == small, sourceLocation: location)
        let huge = leaves.count - small
        #expect(vm.statistics.pages_2m.load(ordering: .relaxed) == huge, sourceLocation: location)
        for leaf in leaves { expectAgrees(leaf, location) }
    }

    /// C1, C2: a leaf shows what the process's own tables show, and is writable only where those are. And hardware
    /// reads it as this code wrote it.
    private func expectAgrees(_ leaf: StageTwoLeaf, _ location: SourceLocation) {
        guard let slot = vm.withSlots({ vm.slot(containing: leaf.guestFrame) }) else { return }
        let walker = GStageWalker(memory: memory, hgatp: mmu.hgatp, hardwareAD: true)
        for i in [0, leaf.level.frames - 1] {
            let frame = GuestFrame(leaf.guestFrame.number + i)
            let primary = space.translate(slot.userAddress(of: frame))
            #expect(primary?.frame.number == leaf.frame.number + i, sourceLocation: location)
            #expect(!leaf.writable || primary?.writable == true, sourceLocation: location)
            let seen = walker.walk(frame.address, .read).translation
            #expect(seen?.frame.number == leaf.frame.number + i && seen?.level == leaf.level, sourceLocation: location)
            #expect(seen?.writable == leaf.writable && seen?.executable == true, sourceLocation: location)
        }
    }

    /// Ends VM and process; every frame must be back (C7, I-28).
    func end(_ location: SourceLocation = #_sourceLocation) {
        vm.destroy()
        space.exit()
        #expect(host.memory.freeFrames == framesBefore, sourceLocation: location)
    }
}
