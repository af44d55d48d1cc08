import Audit
import Frames
import Hardware
import HostMemory
import Paging
import Synchrony
import Testing

@testable import GuestMemory

/// A VM with EPT tables and vCPUs whose accesses go through the hardware's own walker, for tests.
final class TDPMachine {
    let test: TestHost
    let space: AddressSpace
    let mmu: TDPMMU
    let vm: VirtualMachine
    private(set) var cpus: [TDPCPU] = []

    init(
        policy: PolicyKind = .precise, mmu: TDPMMU = TDPMMU(), ramFrames: Int = 4096, deviceFrames: Int = 0,
        thp: Bool = false, cpus count: Int = 1
    ) {
        test = TestHost(ramFrames: ramFrames, deviceFrames: deviceFrames, thp: thp)
        space = test.space()
        self.mmu = mmu
        vm = VirtualMachine(addressSpace: space, mmu: mmu, policy: policy)
        for number in 0..<count {
            let cpu = TDPCPU(number: number, vm: vm, mmu: mmu)
            vm.add(cpu)
            cpus.append(cpu)
        }
    }

    convenience init(
        ramFrames: Int = 4096, thp: Bool = false, cpus: Int = 1, _ change: (inout TDPConfiguration) -> Void
    ) {
        var configuration = TDPConfiguration()
        configuration.cachesMMIO = false
        change(&configuration)
        self.init(mmu: TDPMMU(configuration), ramFrames: ramFrames, thp: thp, cpus: cpus)
    }

    deinit {
        #expect(mmu.checkTables() == [])
        vm.destroy()
        space.exit()
    }

    var cpu: TDPCPU { cpus[0] }
    var journal: Journal { test.journal }
    var statistics: Statistics { vm.statistics }

    /// Maps `count` pages at test page `page` and makes them slot `id` at guest frame `frame`.
    func slot(
        _ id: UInt32 = 0, frame: UInt64 = 0, page: Int = 0, count: Int, backing: Backing? = .anonymous,
        _ protection: Protection = .readWrite, flags: SlotFlags = SlotFlags()
    ) throws {
        if let backing { try space.mapPages(page, count, backing, protection) }
        try set(id, frame: frame, page: page, count: count, flags)
    }

    func set(_ id: UInt32 = 0, frame: UInt64 = 0, page: Int = 0, count: Int, _ flags: SlotFlags) throws {
        try vm.setMemoryRegion(
            MemoryRegion(
                slot: id, flags: flags, guestAddress: GuestFrame(frame).address, size: UInt64(count) * pageSize,
                userAddress: at(page)))
    }

    func logging(_ on: Bool, _ id: UInt32 = 0, frame: UInt64 = 0, page: Int = 0, count: Int) throws {
        try set(id, frame: frame, page: page, count: count, SlotFlags(logDirtyPages: on))
    }

    /// One fault, as the exit handler would report it.
    @discardableResult
    func fault(
        _ access: AccessKind, _ frame: UInt64, present: Bool = false, reserved: Bool = false, cpu: TDPCPU? = nil
    ) -> FaultOutcome {
        let cpu = cpu ?? self.cpu
        if cpu.root == nil { mmu.loadRoot(cpu) }
        return vm.withSlots {
            mmu.handleFault(
                cpu,
                GuestFault(
                    address: GuestFrame(frame).address, access: access, entryPresent: present, isReserved: reserved))
        }
    }

    func leaves() -> [StageTwoLeaf] {
        var all: [StageTwoLeaf] = []
        mmu.forEachLeaf { all.append($0) }
        return all
    }
    func leaf(_ frame: UInt64) -> StageTwoLeaf? {
        leaves().first { $0.guestFrame.number <= frame && frame < $0.guestFrame.number + $0.level.frames }
    }

    /// Sets bits of the entry that maps `frame`, as hardware or a bug would.
    func word(_ frame: UInt64, level: UInt8 = 1) -> AtomicWord {
        var table = mmu.rootPointer(for: cpu) & 0x000f_ffff_ffff_f000
        var at = mmu.configuration.levels
        while true {
            let index = frame >> (9 * UInt64(at - 1)) & 511
            let word = test.memory.word(at: table + index * 8)
            if at == level { return word }
            table = word.load() & 0x000f_ffff_ffff_f000
            at -= 1
        }
    }

    /// The two ends of an invalidation of user pages, as the host's notifier calls them.
    func start(_ range: Range<Int>) { vm.invalidateRangeStart(pages(range), blockable: true) }
    func end(_ range: Range<Int>) { vm.invalidateRangeEnd(pages(range)) }

    func dirtyLog(_ id: UInt32 = 0) throws -> [UInt64] { try vm.getDirtyLog(slot: id) }
    func events(_ kind: Event.Kind) -> [Event] { test.events(kind) }
}

/// A vCPU with a TLB.
final class TDPCPU: VirtualCPU, @unchecked Sendable {
    // Unchecked: restates the base class's; the TLB belongs to the vCPU's task.
    let buffer: TranslationBuffer
    let mmu: TDPMMU
    var drops = 0

    init(number: Int, vm: VirtualMachine, mmu: TDPMMU) {
        buffer = TranslationBuffer(capacity: 64, journal: vm.memory.journal, vcpu: UInt8(number))
        self.mmu = mmu
        super.init(number: number, vm: vm)
    }

    override func dropTranslations() {
        drops += 1
        buffer.invalidateAll()
    }

    private lazy var log: ModificationLog? = mmu.modificationLogPage(of: self).map {
        ModificationLog(memory: vm.memory, frame: $0)
    }
    override var modificationLogIndex: UInt16 { log?.index ?? 511 }
    override func resetModificationLog() { log?.reset() }

    var port: GuestPort {
        let pointer = mmu.rootPointer(for: self)
        guard mmu.configuration.format == .ept else {
            return GuestPort(
                stage: .npt(
                    NPTWalker(
                        memory: vm.memory, root: pointer, mode: mmu.configuration.levels == 5 ? .fiveLevel : .fourLevel)
                ),
                buffer: buffer)
        }
        let walker = EPTWalker(
            memory: vm.memory, pointer: pointer, executeOnly: false, log: mmu.logsModifications(of: self) ? log : nil)
        return GuestPort(stage: .ept(walker), buffer: buffer)
    }

    /// One access in guest mode, without the fault handler.
    func once(_ body: (GuestPort) -> PortResult) -> PortResult {
        enterGuest()
        let result = body(port)
        exitGuest()
        return result
    }

    private func run(_ access: AccessKind, _ address: GuestAddress, _ body: (GuestPort) -> PortResult) -> Result {
        for _ in 0..<100 {
            let result = once(body)
            guard case .fault(let walk) = result else { return .done(result) }
            let fault: GuestFault
            switch walk {
            case .violation(let walk):
                fault = GuestFault(
                    address: address, access: access, entryPresent: walk.present,
                    isReserved: walk.reason == .reservedBits)
            case .misconfiguration where mmu.configuration.cachesMMIO:
                fault = GuestFault(address: address, access: access, entryPresent: false, isReserved: true)
            case .modificationLogFull: continue
            default: return .misconfigured
            }
            let outcome = vm.withSlots { mmu.handleFault(self, fault) }
            switch outcome {
            case .retry, .fixed, .spurious: continue
            default: return .ended(outcome)
            }
        }
        return .livelock
    }

    enum Result: Equatable {
        case done(PortResult)
        case ended(FaultOutcome)
        case misconfigured, livelock
    }

    @discardableResult
    func write(_ frame: UInt64, _ value: UInt64) -> Result {
        let address = GuestFrame(frame).address
        return run(.write, address) { $0.store(address, value) }
    }
    @discardableResult
    func read(_ frame: UInt64) -> Result {
        let address = GuestFrame(frame).address
        return run(.read, address) { $0.load(address) }
    }
}

/// What KVM keeps in an EPT entry, written down again from the specification (x86 1.4), so that a test does not ask
/// the code what it should be.
enum EntryBit {
    static let write: UInt64 = 1 << 1
    static let accessed: UInt64 = 1 << 8
    static let dirty: UInt64 = 1 << 9
    static let hostWritable: UInt64 = 1 << 57
    static let mmuWritable: UInt64 = 1 << 58
    static let counted: UInt64 = 1 << 59
    static let frame: UInt64 = 0x000f_ffff_ffff_f000
    static let empty: UInt64 = 0x8000_0000_0000_0000
    static let frozen: UInt64 = 0x8000_0000_0000_05a0
}
