import CKVMInterface
import Frames
import HostMemory
import IoctlScript
import Machine

/// A scenario as a script that a real kernel can play, and what came of its steps.
///
/// Each step of the plan is one line or, where the guest makes several accesses, a line for each. Tasks of a phase run one
/// after the other, as `run` runs them. The regions lie where scripts have them.
public struct PlanScript: Sendable {
    /// A scenario with something that no script can say.
    public struct Unplayable: Error, Equatable, CustomStringConvertible {
        public let description: String
    }

    /// Of a plan: where its step stands, and the script's lines that are it.
    struct Place: Sendable {
        var phase: Int
        var task: Int
        var step: Int
        var lines: Range<Int>
    }

    public let plan: Plan
    public private(set) var script = Script(lines: [], names: Names())
    private(set) var places: [Place] = []
    /// Lines that make what the plan begins with; none of them may fail.
    private(set) var preparation = 0
    private var slots: [UInt16: Region] = [:]
    private var children: [Int] = []

    private static let mostAccesses = 4096

    public init(_ plan: Plan) throws(Unplayable) {
        self.plan = plan
        try checkHost()
        script.names.vms = ["vm"]
        script.names.cpus = [(0..<UInt64(plan.virtualCPUs)).map { $0 }]
        for (index, region) in plan.regions.enumerated() { try add(region, index) }
        add(.createVM(vm: 0, type: UInt64(KVM_X86_DEFAULT_VM)))
        if plan.dirtyRingBytes != 0 {
            add(
                .enableCapability(
                    vm: 0, capability: UInt64(KVM_CAP_DIRTY_LOG_RING_ACQ_REL), flags: 0,
                    arguments: [plan.dirtyRingBytes]))
        }
        for cpu in 0..<plan.virtualCPUs { add(.createCPU(CPU(vm: 0, cpu: cpu), id: UInt64(cpu))) }
        for slot in plan.slots { add(try setRegion(slot)) }
        preparation = script.lines.count
        for (phase, tasks) in plan.phases.enumerated() {
            for (number, task) in tasks.tasks.enumerated() {
                for (index, step) in task.steps.enumerated() {
                    let first = script.lines.count
                    try add(step.action, task.actor)
                    places.append(
                        Place(phase: phase, task: number, step: index, lines: first..<script.lines.count))
                }
            }
        }
        script = script.renumbered
    }

    private func checkHost() throws(Unplayable) {
        func refuse(_ what: String) -> Unplayable { Unplayable(description: "\(what): only the model has it at will") }
        if plan.swapPages > 0 { throw refuse("a swap device") }
        if plan.hugePages2M > 0 || plan.hugePages1G > 0 { throw refuse("a pool of huge pages") }
        if plan.asyncFaults { throw refuse("asynchronous page faults") }
        if plan.pageTables != nil { throw refuse("the guest's own page tables in a region") }
        if plan.hasPrivateMemory { throw refuse("private memory") }
        if plan.allowUnsafeMappings { throw refuse("allow_unsafe_mappings") }
    }

    private mutating func add(_ step: Step, as process: Int = 0) {
        script.lines.append(Script.Line(number: 0, process: process, step))
    }

    // MARK: The situation

    private mutating func add(_ region: RegionPlan, _ index: Int) throws(Unplayable) {
        let name = String(decoding: region.name, as: UTF8.self)
        guard let kind = region.kind.portable else {
            throw Unplayable(description: "region \(name): only the model has such memory")
        }
        if region.slow || region.userFaults != 0 {
            throw Unplayable(description: "region \(name): only the model's memory can be waited for at will")
        }
        let data = region.size / pageSize &- 1
        if kind == .perfRing, data == 0 || data & (data - 1) != 0 {
            throw Unplayable(description: "region \(name): a ring of events has a page and a power of two of them")
        }
        script.names.regions.append("r\(index)")
        var rights: Rights = []
        if region.read { rights.insert(.read) }
        if region.write { rights.insert(.write) }
        add(.host(region: index, kind, size: region.size, rights))
        if region.hugePages { add(.advise(HostPlace(.region(index)), length: region.size, .hugepage)) }
    }

    private mutating func setRegion(_ slot: SlotPlan) throws(Unplayable) -> Step {
        if slot.guestMemory { throw Unplayable(description: "slot \(slot.id): private memory, which is not played") }
        let region = Region(
            slot: UInt64(slot.id),
            flags: UInt64((slot.logDirtyPages ? KVM_MEM_LOG_DIRTY_PAGES : 0) | (slot.readOnly ? KVM_MEM_READONLY : 0)),
            guestAddress: slot.guestAddress.value, size: slot.size,
            userAddress: HostPlace(.region(slot.region), slot.offset))
        slots[slot.id] = region
        return .setRegion(vm: 0, region, version: 1)
    }

    // MARK: Steps

    private mutating func add(_ action: Action, _ actor: TaskPlan.Actor) throws(Unplayable) {
        func place(_ region: Int, _ offset: UInt64) -> HostPlace { HostPlace(.region(region), offset) }
        switch action {
        case .guest(let kind, let address, let count, let stride, let value):
            guard case .virtualCPU(let number) = actor, count <= Self.mostAccesses else {
                throw Unplayable(description: "\(count) accesses in one step: at most \(Self.mostAccesses) are played")
            }
            for i in 0..<UInt64(count) {
                add(
                    .guest(
                        CPU(vm: 0, cpu: number),
                        GuestAccess(
                            kind.inScripts, address.value &+ i &* stride, value: kind == .write ? value &+ i : 0)))
            }
        case .load(let region, let offset): add(.load(place(region, offset), Repetition()))
        case .store(let region, let offset, let value):
            add(.store(place(region, offset), Repetition(), value: value))
        case .munmap(let region, let offset, let length): add(.unmap(place(region, offset), length: length))
        case .mprotect(let region, let offset, let length, let read, let write):
            var rights: Rights = []
            if read { rights.insert(.read) }
            if write { rights.insert(.write) }
            add(.protect(place(region, offset), length: length, rights))
        case .madviseDontNeed(let region, let offset, let length):
            add(.advise(place(region, offset), length: length, .dontneed))
        case .advise(let region, let offset, let length, let advice):
            add(.advise(place(region, offset), length: length, advice.inScripts))
        case .moveMapping(let region, let offset, let length, let target, let targetOffset):
            add(.remap(place(region, offset), length: length, newLength: length, to: place(target, targetOffset)))
        case .truncate(let region, let size): add(.truncate(region: region, size: size))
        case .punchHole(let region, let offset, let length):
            add(.punchHost(region: region, offset: offset, length: length))
        case .fork:
            script.names.processes.append("child\(script.names.processes.count)")
            children.append(script.names.processes.count - 1)
            add(.fork(process: script.names.processes.count - 1))
        case .childStore(let region, let offset, let value):
            add(.store(place(region, offset), Repetition(), value: value), as: try child())
        case .childLoad(let region, let offset): add(.load(place(region, offset), Repetition()), as: try child())
        case .childExit:
            add(.exit, as: try child())
            children.removeLast()
        default: try addCall(action, actor)
        }
    }

    private func child() throws(Unplayable) -> Int {
        guard let child = children.last else { throw Unplayable(description: "a step of a child that there is not") }
        return child
    }

    private mutating func addCall(_ action: Action, _ actor: TaskPlan.Actor) throws(Unplayable) {
        switch action {
        case .setMemoryRegion(let slot): add(try setRegion(slot))
        case .deleteMemoryRegion(let id):
            var region = slots[id] ?? Region(slot: UInt64(id), guestAddress: 0, size: 0, userAddress: HostPlace(.null))
            region.size = 0
            add(.setRegion(vm: 0, region, version: 1))
        case .getDirtyLog(let id): add(.getDirtyLog(vm: 0, slot: UInt64(id), hasBuffer: true))
        case .clearDirtyLog(let id, let first, let pages):
            add(.clearDirtyLog(vm: 0, ClearedPages(slot: UInt64(id), first: first, count: pages, bits: .all)))
        case .enableManualProtect(let initiallySet):
            add(
                .enableCapability(
                    vm: 0, capability: UInt64(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2), flags: 0,
                    arguments: [initiallySet ? 3 : 1]))
        case .resetRings: add(.resetRings(vm: 0))
        case .collectRing(let cpu): add(.collectRing(CPU(vm: 0, cpu: cpu), most: 65536))
        case .preFault(let address, let size):
            guard case .virtualCPU(let number) = actor else {
                throw Unplayable(description: "a prefault of no vCPU's")
            }
            add(.preFault(CPU(vm: 0, cpu: number), address: address.value, size: size, flags: 0))
        default: throw Unplayable(description: "a step that only the model's host and devices can do at will")
        }
    }

    // MARK: Answers

    /// What came of a step, in the words of scenarios.
    func outcome(_ index: Int, _ answer: Answer) -> StepOutcome {
        if case .failed(let errno) = answer.outcome {
            let said = answer.word("exit") == "memory_fault"
            return said ? .memoryFault : .error(Errno(rawValue: errno) ?? .EIO)
        }
        if case .signal = answer.outcome { return .error(.EFAULT) }
        switch script.lines[index].step {
        case .guest(_, let access):
            switch answer.word("exit") {
            case "mmio", "internal_error": return .mmio
            case "dirty_ring_full": return .dirtyRingFull
            default: return access.kind == .read ? answer.first("values").map { .value($0) } ?? .done : .done
            }
        case .load: return answer.first("values").map { .value($0) } ?? .done
        case .getDirtyLog: return .pages(answer.bits("bits"))
        case .collectRing: return .pages(ringPages(answer))
        case .resetRings:
            if case .returned(let count) = answer.outcome { return .value(UInt64(count)) }
            return .done
        case .preFault: return answer.first("size").map { .value($0) } ?? .done
        default: return .done
        }
    }

    /// Guest frames.
    private func ringPages(_ answer: Answer) -> [UInt64] {
        guard case .entries(let entries)? = answer.fields.first(where: { $0.name == "entries" })?.value else {
            return []
        }
        return entries.map { entry in
            (slots[UInt16(truncatingIfNeeded: entry.slot)].map { $0.guestAddress >> pageShift } ?? 0) + entry.offset
        }.sorted()
    }
}

extension Answer {
    fileprivate func value(_ name: String) -> Value? { fields.first { $0.name == name }?.value }

    fileprivate func word(_ name: String) -> String? {
        if case .word(let word)? = value(name) { word } else { nil }
    }

    fileprivate func first(_ name: String) -> UInt64? {
        switch value(name) {
        case .list(let values): values.first
        case .hex(let value), .decimal(let value): value
        default: nil
        }
    }

    /// The places of the bits that are set.
    fileprivate func bits(_ name: String) -> [UInt64] {
        guard case .list(let words)? = value(name) else { return [] }
        return words.enumerated().flatMap { index, word in
            (0..<64).filter { word >> $0 & 1 == 1 }.map { UInt64(index * 64) + $0 }
        }
    }
}

extension RegionKind {
    /// The kind of scripts that any Linux has; nil: none.
    fileprivate var portable: HostKind? {
        switch self {
        case .anonymous: .anonymous
        case .sharedMemory: .memfd
        case .privateObject: .memfdPrivate
        case .file: .file
        case .privateFile: .filePrivate
        case .secretMemory: .secret
        case .writeNotifyPFNMap: .perfRing
        default: nil
        }
    }
}

extension AccessKind {
    fileprivate var inScripts: GuestAccess.Kind {
        switch self {
        case .read: .read
        case .write: .write
        case .execute: .exec
        }
    }
}

extension AdviceName {
    fileprivate var inScripts: IoctlScript.Advice {
        switch self {
        case .free: .free
        case .cold: .cold
        case .pageOut: .pageout
        case .collapse: .collapse
        case .mergeable: .mergeable
        case .unmergeable: .unmergeable
        case .hugePage: .hugepage
        case .noHugePage: .nohugepage
        case .populateRead: .populateRead
        case .populateWrite: .populateWrite
        case .remove: .remove
        case .guardInstall: .guardInstall
        case .guardRemove: .guardRemove
        }
    }
}
