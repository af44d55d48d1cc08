// Machine: vCPUs that run guest accesses on the modelled hardware, host events, and the world that a plan builds.
//
// It guarantees: a guest access goes through TLB and page walk like on silicon, and reaches KVM's code only by a fault.
// It never decides what is right: it records what happened, and `Checks` compare that with the rules.

import Audit
import Frames
import GuestMemory
import Hardware
import HostMemory
import Paging
import Synchrony

/// How a guest access ended.
public enum AccessResult: Sendable, Equatable {
    /// A load's value.
    case value(UInt64)
    case stored
    /// KVM emulated the store into memory without making an entry (a write through a read-only PFN mapping on x86).
    case emulated
    /// Userspace must emulate it. Kernel: `KVM_EXIT_MMIO`.
    case mmio
    /// The guest was not entered: userspace must reset the dirty ring and try again. Kernel: `KVM_EXIT_DIRTY_RING_FULL`.
    case dirtyRingFull
    /// KVM_RUN failed; with a memory fault if the vCPU's `memoryFault` is there.
    case failed(Errno)
}

/// A vCPU that performs single accesses of 8 bytes. Kernel: a vCPU thread in `KVM_RUN`.
public final class GuestCPU: VirtualCPU, @unchecked Sendable {
    // Unchecked: restates the base class; the buffer belongs to the vCPU's own task.
    public let buffer: TranslationBuffer
    let tables: StageTwoTables

    /// `tables` are those of `vm`.
    public init(number: Int, vm: VirtualMachine, tables: StageTwoTables) {
        buffer = TranslationBuffer(capacity: 64, journal: vm.memory.journal, vcpu: UInt8(number))
        self.tables = tables
        super.init(number: number, vm: vm)
    }

    public override func dropTranslations() { buffer.invalidateAll() }

    /// Faults in a row after which an access counts as a livelock. Spec: X65. Where real threads run, whoever the guest
    /// waits for may be off the processor for long: raise it there.
    public var patience = 1000

    /// The processor's log of what it writes, in the page that the MMU has given it.
    private lazy var log: ModificationLog? = tables.modificationLogPage(of: self).map {
        ModificationLog(memory: vm.memory, frame: $0)
    }
    public override var modificationLogIndex: UInt16 { log?.index ?? 511 }
    public override func resetModificationLog() { log?.reset() }

    /// One access at `address`, 8-byte aligned; `value` for stores, of which only the bits of `mask` are stored. No lock
    /// held.
    public func access(
        _ kind: AccessKind, _ address: GuestAddress, value: UInt64 = 0, mask: UInt64 = .max
    ) -> AccessResult {
        memoryFault = nil
        return persevere(patience, at: address.frame) { step(kind, address, value, mask) } ?? .failed(.EIO)
    }

    /// Runs the guest until the access is done or has faulted once. Nil: the guest is to try again.
    @inline(__always)
    private func step(_ kind: AccessKind, _ address: GuestAddress, _ value: UInt64, _ mask: UInt64) -> AccessResult? {
        if let refusal = enterGuest() { return answer(refusal) }
        let result = attempt(kind, address, value, mask)
        exitGuest()
        switch result {
        case .value(let value): return .value(value)
        case .stored: return .stored
        case .logFull: return nil
        case .fault(let present, let reserved):
            let fault = GuestFault(address: address, access: kind, entryPresent: present, isReserved: reserved)
            return handle(fault, value, mask)
        }
    }

    /// Nil: try to enter the guest again.
    private func answer(_ refusal: EntryRefusal) -> AccessResult? {
        switch refusal {
        case .dirtyRingFull: .dirtyRingFull
        case .halted: sleepUntilReady().map { .failed($0) }
        }
    }

    /// What the TLB holds. For checks.
    var cachedLeaves: [LeafMirror.Leaf] {
        buffer.entries.map { entry in
            let translation = entry.translation
            return LeafMirror.Leaf(
                guest: entry.guest, frame: translation.frame, level: translation.level,
                writable: translation.writable)
        }
    }

    // MARK: Speculation

    /// What the processor may do at any time while it runs guest code: walk the tables for an address that no instruction
    /// has named yet, and keep the result. Called by a task of its own, beside the vCPU's. It sets A as any walk does,
    /// never D, and faults never. If the guest is left meanwhile, the walk ends without a trace in the TLB.
    public func speculate(_ address: GuestAddress) {
        schedulingPoint(.conditionRead, identity.value)
        guard isExecuting else { return }
        let session = entries
        let stage = tables.stage(for: self, log)
        guard case .translated(let translation) = stage.walk(address, .read) else { return }
        buffer.fill(address.frame, translation) { isExecuting && entries == session }
    }

    private enum Attempt {
        case value(UInt64)
        case stored
        case fault(present: Bool, reserved: Bool)
        /// The processor could not log the write; the exit has emptied the log. Kernel: `EXIT_REASON_PML_FULL`.
        case logFull
    }

    private func attempt(
        _ kind: AccessKind, _ address: GuestAddress, _ value: UInt64, _ mask: UInt64
    ) -> Attempt {
        let port = GuestPort(stage: tables.stage(for: self, log), buffer: buffer)
        let observer = vm.memory.journal?.observer
        func reached(_ frame: HostFrame) {
            observer?.accessed(address.frame.number, frame.number, isStore: kind == .write)
        }
        let result =
            switch kind {
            case .read: port.load(address, reached: reached)
            case .write: port.store(address, value, mask: mask, reached: reached)
            case .execute: port.fetch(address, reached: reached)
            }
        switch result {
        case .value(let value): return .value(value)
        case .stored: return .stored
        case .fault(let walk):
            switch walk {
            // Of AMD's processors a reserved bit is a violation like others.
            case .violation(let fault):
                return .fault(present: fault.present, reserved: fault.reason == .reservedBits)
            case .misconfiguration(let fault): return .fault(present: fault.present, reserved: true)
            case .modificationLogFull: return .logFull
            case .translated: return .fault(present: true, reserved: false)
            }
        case .misaligned: preconditionFailure("accesses are 8-byte aligned")
        }
    }

    /// Lets KVM handle the fault. Nil: run the guest again.
    private func handle(_ fault: GuestFault, _ value: UInt64, _ mask: UInt64) -> AccessResult? {
        let side = vm.slotReaders.enter()
        defer { vm.slotReaders.exit(side) }
        switch vm.mmu.handleFault(self, fault) {
        case .retry, .fixed, .spurious: return nil
        case .writeProtected, .emulate: return emulate(fault, value, mask)
        case .failed(let errno), .memoryFault(let errno): return .failed(errno)
        }
    }

    /// The emulator: a store to memory that is not read-only goes through the user mapping, as KVM's emulator does;
    /// all else is MMIO. Caller is inside `withSlots`. Spec: generic section 7, real-kvm "a live finding".
    private func emulate(_ fault: GuestFault, _ value: UInt64, _ mask: UInt64) -> AccessResult {
        if tables.emulatorWritesMemory { CPUStatistics.bump(statistics.insn_emulation) }
        if fault.access == .write, tables.emulatorWritesMemory,
            let slot = slot(containing: fault.frame), !slot.isInvalid, !slot.flags.readOnly
        {
            let address = slot.userAddress(of: fault.frame) + fault.address.offset
            do throws(Errno) {
                let rest = mask == .max ? 0 : try vm.addressSpace.load(address) & ~mask
                try vm.addressSpace.store(address, rest | value & mask)
                vm.markDirty(fault.frame, in: slot, by: self)
                return .emulated
            } catch {
                // The process may not write there either: whatever the reason, the emulator takes it for a device.
            }
        }
        CPUStatistics.bump(statistics.mmio_exits)
        vm.memory.journal?.record(
            Event(
                fault.access == .write ? .mmioWrite : .mmioRead, guest: fault.frame.number, value: value,
                extra: fault.address.value, task: UInt8(number)))
        return .mmio
    }
}

/// The MMU of a machine, and how the hardware finds its tables.
public enum StageTwoTables: Sendable {
    case tdp(TDPMMU)
    case gStage(GStageMMU)
    /// There is no second stage: the processor walks what KVM made of the guest's own tables.
    case shadow(ShadowMMU)
    /// The second stage is the shadow MMU's, made with `ShadowMMU(direct:)`. Kernel: `tdp_mmu=N`.
    case direct(ShadowMMU)

    public var mmu: SecondaryMMU {
        switch self {
        case .tdp(let mmu): mmu
        case .gStage(let mmu): mmu
        case .shadow(let mmu), .direct(let mmu): mmu
        }
    }

    /// Whether KVM has an instruction emulator that writes guest memory (x86).
    var emulatorWritesMemory: Bool {
        switch self {
        case .tdp, .shadow, .direct: true
        case .gStage: false
        }
    }

    /// The walker as the vCPU's registers set it up; `log` is used while the MMU has it on.
    func stage(for cpu: VirtualCPU, _ log: ModificationLog?) -> StageTwo {
        let memory = cpu.vm.memory
        switch self {
        case .tdp(let mmu):
            let isLogging = log != nil && mmu.logsModifications(of: cpu)
            return stage(memory, mmu.configuration, mmu.rootPointer(for: cpu), isLogging ? log : nil)
        case .direct(let mmu): return stage(memory, mmu.secondStage, mmu.rootPointer(for: cpu), nil)
        case .gStage(let mmu): return .gStage(GStageWalker(memory: memory, hgatp: mmu.hgatp, hardwareAD: true))
        case .shadow: preconditionFailure("under shadow paging there is no second stage")
        }
    }

    private func stage(
        _ memory: PhysicalMemory, _ configuration: TDPConfiguration, _ pointer: UInt64, _ log: ModificationLog?
    ) -> StageTwo {
        let bits = Int(configuration.physicalAddressBits)
        guard configuration.format == .ept else {
            return .npt(
                NPTWalker(
                    memory: memory, root: pointer, mode: configuration.levels == 5 ? .fiveLevel : .fourLevel,
                    processor: PagingProcessor(physicalAddressBits: bits, isAMD: true)))
        }
        return .ept(
            EPTWalker(
                memory: memory, pointer: pointer, physicalAddressBits: bits, executeOnly: configuration.executeOnly,
                log: log))
    }

    func modificationLogPage(of cpu: VirtualCPU) -> HostFrame? {
        switch self {
        case .tdp(let mmu): mmu.modificationLogPage(of: cpu)
        case .gStage, .shadow, .direct: nil
        }
    }

    func check() -> [Finding] {
        switch self {
        case .tdp(let mmu): mmu.checkTables()
        case .gStage(let mmu): mmu.checkTables()
        case .shadow(let mmu), .direct(let mmu): mmu.checkTables()
        }
    }
}

extension Architecture {
    /// - Parameter addressSpaces: 2 on x86 for vCPUs with system management mode; other architectures have one.
    public func makeTables(addressSpaces: Int = 1) -> StageTwoTables {
        switch self {
        case .x86TDP: .tdp(TDPMMU(largestPage: .page1G, addressSpaces: addressSpaces))
        case .riscvSv39x4: .gStage(GStageMMU(mode: .sv39x4))
        case .riscvSv48x4: .gStage(GStageMMU(mode: .sv48x4))
        case .x86Shadow: .shadow(ShadowMMU(addressSpaces: addressSpaces))
        case .x86TDPLegacy: .direct(ShadowMMU(direct: Self.ept(addressSpaces, cachesMMIO: false)))
        }
    }

    private static func ept(_ addressSpaces: Int, cachesMMIO: Bool) -> TDPConfiguration {
        var configuration = TDPConfiguration()
        configuration.largestPage = .page1G
        configuration.addressSpaces = addressSpaces
        configuration.cachesMMIO = cachesMMIO
        return configuration
    }

    /// As KVM's module parameters have it: with MMIO caching, where there is any.
    func makeCachingTables() -> StageTwoTables {
        let configuration = Self.ept(1, cachesMMIO: true)
        switch self {
        case .x86TDP: return .tdp(TDPMMU(configuration))
        case .x86TDPLegacy: return .direct(ShadowMMU(direct: configuration))
        default: return makeTables()
        }
    }
}
