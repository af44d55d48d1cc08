import Audit
import Frames
import HostMemory
import Machine

/// A run in the kernel's ftrace text format, with the same PROBE marks as a recorded one, so that the auditor and every
/// viewer of ftrace text read the model's runs too. Spec: x86 section 10.
///
/// Time is counted in events: a microsecond each. There are no entry events on RISC-V, as in the kernel: such a trace
/// has the marks and the notifier's ranges only.
public struct FtraceText {
    private let outcome: RunOutcome
    private var text = ""
    private var tick = 0
    private var kernel: KernelTrace

    public static func render(_ outcome: RunOutcome) -> String {
        var trace = FtraceText(outcome)
        trace.run()
        return trace.text
    }

    private init(_ outcome: RunOutcome) {
        self.outcome = outcome
        kernel = KernelTrace(outcome.architecture)
    }

    private mutating func run() {
        text += "# tracer: nop\n#\n"
        mark("scenario \(String(name: outcome.plan.name))")
        for slot in outcome.plan.slots {
            setRegion(slot)
            mark("set_region ret=0 errno=0")
        }
        var phase = -1
        for result in outcome.steps {
            if result.phase != phase {
                phase = result.phase
                mark("phase \(String(name: outcome.plan.phases[phase].name))")
            }
            step(result)
        }
        mark("phase vm close")
    }

    private mutating func step(_ result: StepResult) {
        let task = outcome.plan.phases[result.phase].tasks[result.task]
        let failure: Errno? =
            switch result.outcome {
            case .error(let errno): errno
            case .memoryFault: .EFAULT
            default: nil
            }
        let code = failure == nil ? "ret=0 errno=0" : "ret=-1 errno=\(failure!.rawValue)"
        switch task.steps[result.step].action {
        case .guest(let kind, let at, let count, let stride, _):
            guard case .virtualCPU(let cpu) = task.actor else { return }
            let op = kind == .write ? "w" : "r"
            mark("guest vcpu=\(cpu) op=\(op) gpa=\(address(at.value)) count=\(count) stride=\(address(stride))")
            events(result)
            // Exit reason 2 is KVM_EXIT_IO, how a recorded guest ends a step; 6 is KVM_EXIT_MMIO, 31
            // KVM_EXIT_DIRTY_RING_FULL, 39 KVM_EXIT_MEMORY_FAULT.
            let exit =
                switch result.outcome {
                case .mmio: 6
                case .dirtyRingFull: 31
                case .memoryFault: 39
                default: failure != nil ? 0 : 2
                }
            mark("guest done vcpu=\(cpu) \(code) exit=\(exit)")
        case .setMemoryRegion(let slot):
            setRegion(slot)
            events(result)
            mark("set_region \(code)")
        case .deleteMemoryRegion(let id):
            mark("set_region slot=\(id) flags=0 gpa=0x0 size=0x0 hva=0x0")
            events(result)
            mark("set_region \(code)")
        case .getDirtyLog(let id):
            mark("get_dirty_log slot=\(id)")
            events(result)
            if case .pages(let pages) = result.outcome { mark("get_dirty_log ret=0 dirty=\(pages.count)") }
        default: events(result)
        }
    }

    private mutating func setRegion(_ slot: SlotPlan) {
        let flags = (slot.logDirtyPages ? 1 : 0) | (slot.readOnly ? 2 : 0) | (slot.guestMemory ? 4 : 0)
        let user = outcome.plan.regions[slot.region].address.value + slot.offset
        mark(
            "set_region slot=\(slot.id) flags=\(flags) gpa=\(address(slot.guestAddress.value))"
                + " size=\(address(slot.size)) hva=\(address(user))")
    }

    private mutating func events(_ result: StepResult) {
        for event in outcome.events[result.events] { line(event) }
    }

    private mutating func line(_ event: Event) {
        guard KernelTrace.hasEntryEvents(outcome.architecture) || event.kind == .notifierStart else { return }
        for line in kernel.lines(event) { emit(line.name, line.body) }
    }

    private mutating func mark(_ text: String) { emit("tracing_mark_write", "PROBE \(text)") }

    private mutating func emit(_ event: String, _ body: String) {
        tick += 1
        let seconds = "\(tick / 1_000_000)".right(5)
        let micros = String("\(1_000_000 + tick % 1_000_000)".dropFirst())
        text += "       faultline-1       [000] .....\(seconds).\(micros): \(event): \(body)\n"
    }
}
