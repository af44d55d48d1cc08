import IoctlScript

/// What a campaign has done so far; from it the campaign goes on.
public struct Tally: Codable, Sendable, Equatable {
    public var seed: UInt64
    /// Scripts that have ended: the next one's seed is `seed` and this.
    public var scripts: UInt64 = 0
    /// Lines of scripts.
    public var steps = 0
    /// Guest accesses, and changes to memory that a slot showed then.
    public var touching = 0
    /// Lines whose answers were compared.
    public var compared = 0
    /// Lines that a side could not do.
    public var notCompared = 0
    /// Scripts that showed a difference while the kernel's own threads moved or took pages, and none when they ran again.
    public var disturbed = 0
    /// How often each call gave each answer on the kernel's side.
    public var answers: [String: [String: Int]] = [:]
    /// How often each rule explained a difference, by name.
    public var explained: [String: Int] = [:]
    /// Seconds.
    public var duration = 0.0
    /// Linux's release.
    public var kernel: String

    public init(seed: UInt64, kernel: String) {
        self.seed = seed
        self.kernel = kernel
    }

    /// Adds what was done beside.
    mutating func add(_ other: Tally) {
        scripts += other.scripts
        steps += other.steps
        touching += other.touching
        compared += other.compared
        notCompared += other.notCompared
        disturbed += other.disturbed
        answers.merge(other.answers) { $0.merging($1, uniquingKeysWith: +) }
        explained.merge(other.explained, uniquingKeysWith: +)
    }

    public var explainedCount: Int { explained.values.reduce(0, +) }

    mutating func count(_ step: Step, _ answer: Answer) {
        answers[step.call, default: [:]][answer.kind, default: 0] += 1
    }
}

extension Step {
    /// The call's word, as in a script; a guest's access with its kind.
    var call: String {
        switch self {
        case .host: "host"
        case .map: "mmap"
        case .unmap: "munmap"
        case .protect: "mprotect"
        case .advise(_, _, let advice): "madvise \(advice.name)"
        case .remap: "mremap"
        case .truncate: "truncate"
        case .punchHost: "punch"
        case .load: "load"
        case .store: "store"
        case .splice: "vmsplice"
        case .drain: "drain"
        case .fork: "process"
        case .exit: "exit"
        case .createVM: "vm"
        case .createCPU: "vcpu"
        case .close: "close"
        case .setRegion(_, _, let version): version == 1 ? "region" : "region2"
        case .getDirtyLog: "get_dirty_log"
        case .clearDirtyLog: "clear_dirty_log"
        case .enableCapability: "enable_cap"
        case .checkExtension: "check_extension"
        case .createMemfd: "memfd"
        case .allocate: "allocate"
        case .setAttributes: "attributes"
        case .preFault: "prefault"
        case .collectRing: "ring_collect"
        case .resetRings: "ring_reset"
        case .withoutArgument(_, let call): call.rawValue
        case .statistics: "stats"
        case .guest(_, let access): "guest \(access.kind.rawValue)" + (access.emulated ? " by emulator" : "")
        }
    }
}

extension Answer {
    /// Its outcome without numbers: an errno, a signal, an exit of the guest's.
    var kind: String {
        switch outcome {
        case .returned:
            if case .word(let exit)? = fields.first(where: { $0.name == "exit" })?.value { exit } else { "ok" }
        case .failed(let errno): errnoName(errno)
        case .signal(let name): name
        case .notHere: "not here"
        }
    }
}

/// What slots show of the processes' memory: ranges of addresses, as KVM has accepted them.
struct ShownMemory {
    private var slots: [Key: Range<UInt64>] = [:]
    private struct Key: Hashable {
        var vm: Int
        var slot: UInt64
    }

    mutating func note(_ step: Step, _ answer: Answer) {
        guard case .setRegion(let vm, let region, _) = step, answer.outcome == .returned(0) else { return }
        let start = region.userAddress.address
        let (end, wraps) = start.addingReportingOverflow(region.size)
        slots[Key(vm: vm, slot: region.slot)] = region.size == 0 || wraps ? nil : start..<end
    }

    /// Whether the step is a guest's access, or reads or changes memory that a slot shows.
    func isTouched(by step: Step) -> Bool {
        switch step {
        case .guest: true
        case .map(let place, let length, _, _, _), .unmap(let place, let length), .protect(let place, let length, _),
            .advise(let place, let length, _), .remap(let place, let length, _, _):
            shows(place.address, length)
        case .load(let place, let repetition), .store(let place, let repetition, _):
            shows(place.address, (repetition.count &- 1) &* repetition.stride &+ 8)
        case .truncate(let region, _): shows(HostPlace(.region(region)).address, HostPlace.regionSpacing)
        case .punchHost(let region, let offset, let length):
            shows(HostPlace(.region(region), offset).address, length)
        default: false
        }
    }

    private func shows(_ address: UInt64, _ length: UInt64) -> Bool {
        let (sum, overflow) = address.addingReportingOverflow(max(1, length))
        let range = address..<(overflow ? .max : sum)
        return slots.values.contains { $0.overlaps(range) }
    }
}
