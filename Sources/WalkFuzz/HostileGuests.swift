import Frames
import GuestMemory
import HostMemory
import Machine
import Paging
import SeededRandom

/// What random guests came to.
public struct HostileGuestReport: Sendable, Equatable {
    public let seed: UInt64
    public var walks = 0
    public var reached = 0
    public var mmio = 0
    public var pageFaults = 0
    /// Told to a guest hypervisor.
    public var nestedExits = 0
    /// What must not be, the first ten: each with the walk's number.
    public var failures: [String] = []

    init(seed: UInt64) { self.seed = seed }
}

/// Lets KVM itself walk the random tables of guests `count` times: those of guests under shadow paging, in all modes, and
/// those of guest hypervisors, for EPT and NPT. Half of the walks are the emulator's, half are whole faults, which make
/// shadow pages of what they find. No walk may end nowhere, nothing may be mapped but the guest's own memory, and no rule
/// may break. Nil when this machine does not give 8 MiB of memory.
public func runHostileGuests(count: Int, seed: UInt64) -> HostileGuestReport? {
    var report = HostileGuestReport(seed: seed)
    var random = SplitMix(seed: seed ^ 0x686f_7374)
    var kind = 0
    while report.walks < count {
        let walks = min(4096, count - report.walks)
        guard let guest = HostileGuest(Kind.allCases[kind % Kind.allCases.count], report, &random) else { return nil }
        guest.run(walks, &random)
        report = guest.report
        kind += 1
    }
    return report
}

private enum Kind: CaseIterable { case shadow, nestedEPT, nestedNPT }

private final class HostileGuest {
    private enum Processor {
        case paged(ShadowMMU, PagedCPU)
        case nested(TDPMMU, NestedCPU)
    }
    private let kind: Kind
    private let memory: HostileMemory
    private let processor: Processor
    private(set) var report: HostileGuestReport
    /// Its memory has tables.
    private var isSet = false

    init?(_ kind: Kind, _ report: HostileGuestReport, _ random: inout SplitMix) {
        self.kind = kind
        self.report = report
        guard kind != .shadow else {
            let mmu = ShadowMMU()
            guard let memory = HostileMemory(mmu) else { return nil }
            self.memory = memory
            let cpu = PagedCPU(number: 0, vm: memory.vm, mmu: mmu)
            memory.vm.add(cpu)
            processor = .paged(mmu, cpu)
            return
        }
        var configuration = TDPConfiguration()
        configuration.nested = true
        configuration.cachesMMIO = false
        configuration.format = kind == .nestedEPT ? .ept : .npt
        configuration.levels = random.next() & 1 == 0 ? 4 : 5
        let mmu = TDPMMU(configuration)
        guard let memory = HostileMemory(mmu) else { return nil }
        self.memory = memory
        let cpu = NestedCPU(number: 0, vm: memory.vm, mmu: mmu)
        memory.vm.add(cpu)
        processor = .nested(mmu, cpu)
    }

    private func fail(_ what: String) {
        if report.failures.count < 10 { report.failures.append("walk \(report.walks): \(what)") }
    }

    func run(_ count: Int, _ random: inout SplitMix) {
        let end = report.walks + count
        while report.walks < end {
            if report.walks % 1024 == 0 || !isSet { setUp(&random) }
            if random.next() % 32 == 0 { load(&random) }
            walk(&random)
            report.walks += 1
            if report.walks % 256 == 0 { check() }
        }
        check()
        memory.end()
        if let finding = memory.journal.findings.first { fail("\(finding)") }
    }

    private func setUp(_ random: inout SplitMix) {
        do throws(Errno) { try memory.renew(&random, ept: kind == .nestedEPT) } catch { fail("no memory: \(error)") }
        isSet = true
        load(&random)
    }

    /// Other registers, or the same tables anew.
    private func load(_ random: inout SplitMix) {
        switch processor {
        case .paged(let mmu, let cpu):
            mmu.state(of: cpu).isUser = random.next() & 1 == 0
            if !mmu.load(registers(&random), on: cpu) { cpu.flushAll() }
        case .nested(let mmu, let cpu):
            mmu.leaveNested(cpu)
            if random.next() & 3 == 0 { rewrite(cpu, &random) }
            if random.next() & 1 == 0 { mmu.invalidateEPT(nil, cpu) }
            enter(mmu, cpu, &random)
        }
    }

    /// The hypervisor writes one of its tables.
    private func rewrite(_ cpu: NestedCPU, _ random: inout SplitMix) {
        let place = HostileMemory.target(&random) & 0xff_ffff | random.next() & 0xff8
        _ = cpu.access(.store(HostileMemory.entry(&random, ept: kind == .nestedEPT)), at: place)
    }

    private func enter(_ mmu: TDPMMU, _ cpu: NestedCPU, _ random: inout SplitMix) {
        let root = HostileMemory.target(&random)
        let bits = random.next()
        let five = mmu.configuration.levels == 5 && bits & 1 == 0
        do throws(Errno) {
            if kind == .nestedEPT {
                let pointer = root & ~(~0 << 46) | 6 | (five ? 4 : 3) << 3 | (bits & 2) << 5
                try mmu.enterNested(
                    EPTTables(
                        pointer: pointer, physicalAddressBits: 46, hasGigabytePages: bits & 4 != 0,
                        executeOnly: bits & 8 != 0), cpu)
            } else {
                try mmu.enterNested(hypervisorRegisters(root, bits, five), cpu)
            }
        } catch { preconditionFailure("the pointer is valid: \(error)") }
    }

    /// In any mode with paging.
    private func hypervisorRegisters(_ root: UInt64, _ bits: UInt64, _ five: Bool) -> GuestRegisters {
        switch bits >> 8 & 3 {
        case 0: .twoLevels(root & 0xffff_f000, largePages: bits & 2 != 0)
        case 1: .physicalExtension(root & 0xffff_f000 | bits >> 16 & 0xfe0)
        default:
            five
                ? .fiveLevels(root: GuestAddress(root))
                : .longMode(root: GuestAddress(root), noExecute: bits & 2 != 0)
        }
    }

    private func registers(_ random: inout SplitMix) -> GuestRegisters {
        let root = HostileMemory.target(&random)
        let bits = random.next()
        var registers: GuestRegisters
        switch bits % 8 {
        case 0: registers = .unpaged
        case 1: registers = .twoLevels(root & 0xffff_f000, largePages: bits & 8 != 0)
        case 2: registers = .physicalExtension(root & 0xffff_f000 | (bits & 0xfe0))
        case 3: registers = .fiveLevels(root: GuestAddress(root))
        default: registers = .longMode(root: GuestAddress(root), noExecute: bits & 16 != 0)
        }
        if bits & 32 != 0 { registers.cr0 &= ~(1 << 16) }
        if bits & 64 != 0 { registers.cr4 |= 1 << 20 }
        if bits & 128 != 0 { registers.cr4 |= 1 << 21 }
        registers.physicalAddressBits = [36, 40, 46, 52][Int(bits >> 8 & 3)]
        registers.hasGigabytePages = bits & 0x400 != 0
        return registers
    }

    private func walk(_ random: inout SplitMix) {
        let bits = random.next()
        switch processor {
        case .paged(let mmu, let cpu):
            let levels = mmu.state(of: cpu).registers.levels
            let address = canonical(random.next() & ~7, levels == 5 ? 57 : levels == 4 ? 48 : 32)
            guard bits & 1 == 0 else {
                let code = FaultCode(rawValue: bits >> 8 & 0x16)
                let found = mmu.vm.withSlots { mmu.translate(cpu, address, code) }
                if found == nil { report.pageFaults += 1 } else { report.reached += 1 }
                return
            }
            judge(cpu.access(access(bits), at: address))
        case .nested(let mmu, let cpu):
            // What a second stage translates is not sign-extended.
            let address = random.next() & ~7 & (mmu.configuration.levels == 5 ? 1 << 57 - 1 : 1 << 48 - 1)
            guard bits & 3 != 0 else { return fault(mmu, cpu, address, AccessKind.allCases[Int((bits >> 16) % 3)]) }
            judge(cpu.access(access(bits), at: address))
        }
    }

    /// A fault anywhere: a nested guest that has paging on has more than the 32 bits which `access` gets to.
    private func fault(_ mmu: TDPMMU, _ cpu: NestedCPU, _ address: UInt64, _ access: AccessKind) {
        let state = mmu.shadowState(of: cpu)
        state.nestedExit = nil
        let fault = GuestFault(address: GuestAddress(address), access: access, entryPresent: false)
        for _ in 0..<100 {
            guard cpu.enterGuest() == nil, let nested = mmu.nested else {
                return fail("the nested guest is not entered")
            }
            cpu.exitGuest()
            switch mmu.vm.withSlots({ mmu.handleFault(cpu, fault) }) {
            case .fixed, .spurious:
                if nested.leaf(of: cpu, at: address) == nil { fail("a fault at \(address) is fixed by nothing") }
                report.reached += 1
            case .writeProtected: report.reached += 1
            case .emulate: report.mmio += 1
            case .retry:
                guard state.nestedExit != nil else { continue }
                report.nestedExits += 1
            case .failed(let errno), .memoryFault(let errno): fail("\(errno)")
            }
            return
        }
        fail("a fault at \(address) has no end")
    }

    private func access(_ bits: UInt64) -> PagedAccess {
        [.load, .store(bits), .fetch, .lockedAdd(bits)][Int(bits >> 16 & 3)]
    }

    private func canonical(_ address: UInt64, _ width: UInt64) -> UInt64 {
        guard width > 32 else { return address & 0xffff_ffff }
        return UInt64(bitPattern: Int64(bitPattern: address << (64 - width)) >> Int64(64 - width))
    }

    private func judge(_ result: PagedAccessResult) {
        switch result {
        case .value, .stored, .emulated: report.reached += 1
        case .mmio: report.mmio += 1
        case .pageFault: report.pageFaults += 1
        case .nestedExit: report.nestedExits += 1
        case .failed(let errno): fail("\(errno)")
        case .dirtyRingFull: fail("a dirty ring is full that was not asked for")
        }
    }

    private func check() {
        if let what = memory.escape() { fail(what) }
        let findings =
            switch processor {
            case .paged(let mmu, _): mmu.checkTables()
            case .nested(let mmu, _): mmu.checkTables()
            }
        if let finding = findings.first { fail("\(finding)") }
    }
}
