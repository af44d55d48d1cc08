import Audit
import Frames
import GuestMemory
import Hardware
import HostMemory
import Paging
import Synchrony

/// Why a plan can't be set up.
public enum PlanError: Error, Sendable, Equatable {
    /// A region can't be mapped: its index, and what mmap or the driver said.
    case region(Int, Errno)
    /// A slot can't be created: its index, and KVM's errno.
    case slot(Int, Errno)
    /// Memory has not so many huge pages of this size to set aside.
    case hugePages(PageLevel)
    /// The architecture has no VMs with private memory.
    case privateMemory
    /// Steps on the guest's own page tables, and no shadow paging.
    case guestTables
    /// Dirty rings of this size can't be, or a vCPU's can't be made.
    case dirtyRings(Errno)
}

/// What a scenario's file says of a policy: rules that it breaks anyhow.
public struct KnownDeviations: Sendable, Equatable {
    public var rules: [Invariant] = []
    public var unexpectedSteps = false
    public init() {}
}

/// A host, a VM and its vCPUs, as a plan describes them; runs the plan's phases in the order written.
///
/// One task runs everything here. The memory arena belongs to the caller and must outlive the world.
public final class World {
    public let plan: Plan
    public let architecture: Architecture
    public let policy: PolicyName
    public let journal: Journal
    public let host: Host
    public let addressSpace: AddressSpace
    public let vm: VirtualMachine
    let tables: StageTwoTables
    let cpus: [GuestCPU]
    /// The vCPUs under shadow paging, in the place of `cpus`, and the guest's own tables.
    let pagedCPUs: [PagedCPU]
    let guestTables: GuestTables?
    /// The slot of the tables, if the plan named no memory for them: the VMM has nothing to do with it.
    let tableSlot: UInt16?
    var regions: [Region] = []
    var children: [AddressSpace] = []
    /// Pages that a step has pinned and none unpinned yet.
    var pins: [HeldPin] = []
    /// The largest pages first.
    let pools: [HugePagePool]
    /// Who serves the VMM's faults, if a region wants it.
    var userFaults: UserFaults?
    /// Who uses the log, where the plan has such steps.
    private(set) var consumers: Consumers?
    /// What the VMM and KVM keep for the plan's rings, private memory and frame caches.
    let rings: RingHarvest
    var privateFiles: [PrivateFile] = []
    var cachedPages: [CachedPage] = []
    /// Tasks of the running phase that `run` has begun, when one of them serves the faults of another.
    private var begun: [Int] = []
    /// One task plays all parts, in the order written.
    private(set) var isSequential = false
    /// Broken frames: they never come back.
    var brokenFrames = 0
    var results: [StepResult] = []
    /// Results of the running phase, by task.
    private var taskResults: [[StepResult]] = []
    let checks: Checks
    let stepChecks: StepChecks
    /// Free frames before anything was made, for I-28.
    private let framesAtStart: Int

    /// Bytes of arena that `plan` needs.
    public static func arenaSize(for plan: Plan) -> Int { (plan.ramFrames + plan.deviceFrames) * Int(pageSize) }

    /// - Parameter arena: page-aligned, `arenaSize(for: plan)` bytes.
    public convenience init(
        _ plan: Plan, policy: PolicyName, architecture: Architecture? = nil, arena: UnsafeMutableRawPointer,
        arenaIsZero: Bool, keepsEvents: Bool = true
    ) throws(PlanError) {
        let journal = Journal(keepsEvents: keepsEvents)
        let memory = PhysicalMemory(
            arena: arena, ramFrames: plan.ramFrames, deviceFrames: plan.deviceFrames, arenaIsZero: arenaIsZero,
            journal: journal)
        try self.init(plan, policy, architecture ?? plan.architecture, memory, journal)
    }

    /// A world on storage that others have used before it, made for `plan`'s frames.
    public convenience init(
        _ plan: Plan, policy: PolicyName, architecture: Architecture? = nil, storage: MemoryStorage,
        keepsEvents: Bool = true
    ) throws(PlanError) {
        let journal = Journal(keepsEvents: keepsEvents)
        let memory = PhysicalMemory(storage, journal: journal)
        precondition(memory.ram.count == plan.ramFrames && memory.device.count == plan.deviceFrames)
        try self.init(plan, policy, architecture ?? plan.architecture, memory, journal)
    }

    private init(
        _ plan: Plan, _ policy: PolicyName, _ chosen: Architecture, _ memory: PhysicalMemory, _ journal: Journal
    ) throws(PlanError) {
        let tablesOfGuest = chosen == .x86Shadow ? GuestTables(plan) : nil
        let isOwn = plan.pageTables == nil
        let plan = tablesOfGuest.map { plan.with($0) } ?? plan
        guestTables = tablesOfGuest
        tableSlot = tablesOfGuest != nil && isOwn ? plan.slots.last?.id : nil
        self.plan = plan
        self.policy = policy
        self.architecture = chosen
        LockViolations.clear()
        self.journal = journal
        host = Host(
            memory: memory, transparentHugePages: plan.transparentHugePages,
            swap: plan.swapPages > 0 ? SwapDevice(slots: plan.swapPages, slow: plan.swapIsSlow) : nil,
            reclaims: plan.reclaims)
        pools = try Self.setAside(plan, host)
        framesAtStart = memory.freeFrames
        addressSpace = AddressSpace(host: host)
        tables = chosen.makeCachingTables()
        guard plan.fits(chosen) else { throw plan.hasPrivateMemory ? .privateMemory : .guestTables }
        vm = VirtualMachine(
            addressSpace: addressSpace, mmu: tables.mmu, policy: policy.kind,
            allowUnsafeMappings: plan.allowUnsafeMappings,
            type: plan.hasPrivateMemory ? .softwareProtected : .standard)
        (cpus, pagedCPUs) = try Self.makeCPUs(plan, vm, tables)
        rings = RingHarvest(vm.virtualCPUs)
        checks = Checks(vm: vm, tables: tables, cpus: cpus, paged: pagedCPUs, policy: policy)
        stepChecks = StepChecks(vm, cpus, journal, paged: pagedCPUs)
        journal.observer = stepChecks
        try setUp()
        if Consumers.areWanted(by: plan) {
            let consumers = Consumers(self)
            self.consumers = consumers
            stepChecks.consumers = consumers
        }
    }

    private static func makeCPUs(
        _ plan: Plan, _ vm: VirtualMachine, _ tables: StageTwoTables
    ) throws(PlanError) -> ([GuestCPU], [PagedCPU]) {
        do throws(Errno) {
            if plan.dirtyRingBytes > 0 { try vm.enableDirtyRings(bytes: plan.dirtyRingBytes) }
            var cpus: [GuestCPU] = []
            var paged: [PagedCPU] = []
            for number in 0..<plan.virtualCPUs {
                if case .shadow(let mmu) = tables {
                    let cpu = PagedCPU(number: number, vm: vm, mmu: mmu)
                    cpu.allowsAsyncFaults = plan.asyncFaults
                    try vm.create(cpu)
                    paged.append(cpu)
                    continue
                }
                let cpu = GuestCPU(number: number, vm: vm, tables: tables)
                cpu.allowsAsyncFaults = plan.asyncFaults
                try vm.create(cpu)
                cpus.append(cpu)
            }
            return (cpus, paged)
        } catch {
            throw .dirtyRings(error)
        }
    }

    private static func setAside(_ plan: Plan, _ host: Host) throws(PlanError) -> [HugePagePool] {
        var pools: [HugePagePool] = []
        for (level, pages) in [(PageLevel.page1G, plan.hugePages1G), (.page2M, plan.hugePages2M)] where pages > 0 {
            guard let pool = HugePagePool(host, level: level, pages: pages) else { throw .hugePages(level) }
            pools.append(pool)
        }
        return pools
    }

    private func setUp() throws(PlanError) {
        var graphics: GraphicsDevice?
        if plan.videoMemoryPages > 0 || plan.graphicsSystemPages > 0 {
            graphics = GraphicsDevice(
                host, deviceMemoryPages: plan.videoMemoryPages == 0 ? .max : plan.videoMemoryPages,
                systemPages: plan.graphicsSystemPages == 0 ? .max : plan.graphicsSystemPages)
        }
        for (index, region) in plan.regions.enumerated() {
            do throws(Errno) {
                regions.append(try Region(region, host, graphics, pools, earlier: regions, addressSpace: addressSpace))
            } catch {
                throw .region(index, error)
            }
        }
        try registerUserFaults()
        for (index, slot) in plan.slots.enumerated() {
            do throws(Errno) {
                try vm.setMemoryRegion(try memoryRegion(slot))
            } catch {
                throw .slot(index, error)
            }
        }
        try startGuest()
    }

    private func registerUserFaults() throws(PlanError) {
        for (index, region) in plan.regions.enumerated() where region.userFaults != 0 {
            let server = userFaults ?? UserFaults(of: addressSpace)
            userFaults = server
            do throws(Errno) {
                try addressSpace.register(
                    region.address..<(region.address + region.size), UserFaults.Modes(rawValue: region.userFaults),
                    server)
            } catch {
                throw .region(index, error)
            }
        }
    }

    func memoryRegion(_ slot: SlotPlan) throws(Errno) -> MemoryRegion {
        MemoryRegion(
            slot: UInt32(slot.id),
            flags: SlotFlags(
                logDirtyPages: slot.logDirtyPages, readOnly: slot.readOnly, guestMemory: slot.guestMemory),
            guestAddress: slot.guestAddress, size: slot.size,
            userAddress: plan.regions[slot.region].address + slot.offset,
            guestMemory: slot.guestMemory ? .file(try privateFile(of: slot)) : .closed)
    }

    /// Runs every phase, checks the rules after each, takes everything down, and checks that nothing is left.
    /// Call it once.
    public func run() -> RunOutcome {
        isSequential = true
        for phase in plan.phases.indices {
            begun = []
            userFaults?.whenWaiting = { [unowned(unsafe) self] in self.serve(phase) }
            for task in plan.phases[phase].tasks.indices where !begun.contains(task) {
                begun.append(task)
                runTask(phase, task)
            }
            endPhase(phase)
        }
        userFaults?.whenWaiting = nil
        return finish()
    }

    /// Runs whoever serves userfaults while the running task waits; if there is nobody left, it must do without.
    private func serve(_ phase: Int) {
        let tasks = plan.phases[phase].tasks
        for task in tasks.indices where !begun.contains(task) && tasks[task].actor == .background(.userFaultServer) {
            begun.append(task)
            return runTask(phase, task)
        }
        userFaults?.abandon()
    }

    /// Every task of the phase has ended: checks the rules that hold at rest.
    public func endPhase(_ phase: Int) {
        for task in taskResults.indices { results += taskResults[task] }
        taskResults = []
        let leaves = checks.run(journal)
        stepChecks.checkAtRest(leaves)
    }

    /// Takes everything down after the last phase and checks that nothing is left.
    public func finish() -> RunOutcome {
        let states = regions.indices.map { state(of: $0) }
        let statistics = StatisticName.allCases.map { StatisticExpectation($0, value(of: $0)) }
        var mismatches: [(StatisticName, expected: UInt64, found: UInt64)] = []
        for wanted in plan.expectations where wanted.architectures.contains(architecture) {
            let found = value(of: wanted.statistic)
            if found != wanted.value { mismatches.append((wanted.statistic, wanted.value, found)) }
        }
        let events = journal.events
        let counters = [vm.statistics.inOrder] + vm.virtualCPUs.map { $0.statistics.inOrder }
        takeDown()
        journal.observer = nil
        return RunOutcome(
            plan: plan, architecture: architecture, policy: policy, steps: results, events: events,
            findings: journal.findings, holdings: journal.holdings, statistics: statistics,
            statisticMismatches: mismatches, counters: counters, regions: states, totals: EventTotals(events))
    }

    /// Runs one task of a phase to its end. The explorer runs several side by side; a step's range of events then holds
    /// the others' too.
    public func runTask(_ phase: Int, _ task: Int) {
        while taskResults.count < plan.phases[phase].tasks.count { taskResults.append([]) }
        let plan = plan.phases[phase].tasks[task]
        for step in plan.steps.indices {
            let first = journal.count
            let (outcome, expected, repetition) = run(plan.steps[step], plan.actor)
            taskResults[task].append(
                StepResult(
                    phase: phase, task: task, step: step, outcome: outcome, expected: expected,
                    repetition: repetition, events: first..<journal.count))
        }
        checks.noteLockViolations(journal)
    }

    /// The same without a report: whether nothing was found and every step gave what the plan expects. For the explorer,
    /// which makes a run again when it wants to see more.
    /// - Parameter known: findings that don't count, and whether unexpected steps do.
    public func conclude(ignoring known: KnownDeviations = KnownDeviations()) -> Bool {
        takeDown()
        journal.observer = nil
        let unexpected = !known.unexpectedSteps && !results.allSatisfy { $0.expected }
        return !unexpected && journal.findings.allSatisfy { known.rules.contains($0.invariant) }
            && journal.holdings.isEmpty
    }

    // MARK: Hardware as a participant

    /// vCPUs that have a task in a phase with several tasks: each gets a task that walks speculatively.
    public static func speculators(_ plan: Plan, _ phase: Int) -> [Int] {
        let tasks = plan.phases[phase].tasks
        guard tasks.count > 1 else { return [] }
        var numbers: [Int] = []
        for task in tasks {
            if case .virtualCPU(let number) = task.actor { numbers.append(number) }
        }
        return numbers
    }

    /// Speculative walks of vCPU `number` in a phase, one for each guest page that its task touches, at most two.
    public func speculate(_ phase: Int, _ number: Int) {
        var pages: [GuestFrame] = []
        for task in plan.phases[phase].tasks {
            guard case .virtualCPU(number) = task.actor else { continue }
            for step in task.steps {
                guard case .guest(_, let address, _, _, _) = step.action, pages.count < 2 else { continue }
                if !pages.contains(address.frame) { pages.append(address.frame) }
            }
        }
        for page in pages {
            if pagedCPUs.isEmpty {
                cpus[number].speculate(page.address)
            } else {
                pagedCPUs[number].speculate(page.address.value)
            }
        }
        checks.noteLockViolations(journal)
    }

    /// Ends the VM and every process, and checks that all of KVM's and the process's memory is free again. I-1, I-28.
    private func takeDown() {
        for page in cachedPages { page.cache.deactivate() }
        vm.destroy()
        for file in privateFiles { file.file.closeDescriptor() }
        journal.checkQuiescent()
        for pin in pins { pin.release() }
        for child in children { child.exit() }
        addressSpace.exit()
        var owned = brokenFrames
        for region in regions { owned += region.release() }
        if host.memory.freeFrames + owned != framesAtStart {
            journal.add(Finding(.i28, "memory is still in use after the VM and its process have ended"))
        }
        for pool in pools where !pool.isWhole {
            journal.add(Finding(.i28, "a pool of huge pages has not all of its pages back"))
        }
    }
}

extension PolicyName {
    var kind: PolicyKind {
        switch self {
        case .precise: .precise
        case .tracked: .tracked
        case .guess: .guess
        }
    }
}

/// A pin that a step took, until another step or the world's end gives it back.
final class HeldPin {
    let address: UserAddress
    let frame: HostFrame
    private var pin: PagePin?

    init(_ address: UserAddress, _ pin: consuming PagePin) {
        self.address = address
        frame = pin.frame
        self.pin = consume pin
    }

    func release() {
        if let pin = pin.take() { pin.unpin(dirty: true) }
    }
}
