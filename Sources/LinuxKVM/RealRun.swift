// LinuxKVM: scripts of memory calls on this machine's `/dev/kvm`, with the answers that the model gives in the same words.
//
// It guarantees that nothing of a script happens in this process: each runs in processes of its own, with limits of time and
// memory, and whatever becomes of them, what they had is gone with them. It never touches what it did not make, and needs no
// rights beyond those of the device. Steps become calls in `CallEncoding.swift`, answers text in `AnswerDecoding.swift`;
// `CLinuxKVM` makes the calls.

import CLinuxKVM
import Glibc
import IoctlScript

/// The kernel's side of scripts: a child process that answers one after another. One caller at a time.
public final class RealRun {
    public struct Options: Sendable {
        /// The device.
        public var path = "/dev/kvm"
        /// How long a call may take before the script is ended, in milliseconds.
        public var deadline = 10_000
        /// Bytes of private memory that a process may have, and of shared memory that a script may make.
        public var memory = UInt64(max(0, sysconf(Int32(_SC_PHYS_PAGES)))) * 4096 / 2
        /// A cgroup in which the child makes one for itself, with so much memory.
        public var memoryGroup: String?
        /// Bytes that the cgroup has; nil: `memory`.
        public var groupMemory: UInt64?
        /// Seconds of processor time of each process.
        public var processorSeconds: UInt64 = 3600
        /// Pages of the largest slot that is made: its tables are the kernel's memory, and not small.
        public var slotPages: UInt64 = 1 << 24
        /// Whether memory may be made of huge pages, as the machine is set up. Where not, they can't be asked for either.
        public var hugePages = false
        /// Whether a private instance of tracefs records what KVM does for each script. Needs root.
        public var records = false
        // A call that fails without being made: of the start in this process, and of the child's own preparation.
        var start = ForcedError.none
        var preparation = ForcedError.none
        public init() {}
    }

    /// A system call that fails without being made: its number among those of a run, from 1.
    struct ForcedError: Equatable {
        var call: UInt64
        var errno: Int32
        static let none = ForcedError(call: 0, errno: 0)
    }

    /// The device can't be used.
    public struct Unavailable: Error, Equatable, CustomStringConvertible {
        public let reason: String
        public var description: String { reason }
        public init(reason: String) { self.reason = reason }
    }

    /// The kernel did not answer a call: it hung, or ended the process that made it.
    public struct Finding: Error, Equatable {
        /// The answers before.
        public let answers: [Answer]
        /// The call's place among the script's lines.
        public var index: Int { answers.count }
        public let reason: String
    }

    public enum Failure: Error, Equatable {
        case unavailable(Unavailable)
        case finding(Finding)
    }

    private let options: Options
    /// Nil: not started, or broken.
    private var child: OpaquePointer?
    private var encoding = CallEncoding(emulates: false, sharedMemory: 0)
    private var isRunning = false
    /// Whether KVM's instruction emulator executes a guest's privileged code; nil: not asked yet.
    private var emulates: Bool?

    /// Starts the child, which opens the device.
    public init(_ options: Options = Options()) throws(Unavailable) {
        self.options = options
        try start()
    }

    deinit { if let child { fl_kvm_stop(child) } }

    private func start() throws(Unavailable) {
        var end = fl_kvm_end()
        var options = fl_kvm_options()
        options.private_memory = self.options.memory
        options.group_bytes = self.options.groupMemory ?? self.options.memory
        options.processor_seconds = self.options.processorSeconds
        options.slot_pages = self.options.slotPages
        options.huge_pages = self.options.hugePages ? 1 : 0
        options.records = self.options.records ? 1 : 0
        options.start = fl_switch(made: 0, forced: self.options.start.call, error: self.options.start.errno)
        options.keeper = fl_switch(
            made: 0, forced: self.options.preparation.call, error: self.options.preparation.errno)
        child = self.options.path.withCString { path in
            options.device = path
            guard let group = self.options.memoryGroup else { return fl_kvm_start(&options, &end) }
            return group.withCString { group in
                options.memory_group = group
                return fl_kvm_start(&options, &end)
            }
        }
        if child == nil { throw Unavailable(end, path: self.options.path) }
    }

    // MARK: Scripts

    /// Runs a script from the beginning: one answer for each line.
    public func answers(of script: Script) throws(Failure) -> [Answer] { try answers(of: script, forcing: .none) }

    /// The same, with what ended the script early beside the answers before it; nil: nothing did.
    public func answersAndEnd(of script: Script) throws(Unavailable) -> (answers: [Answer], end: Finding?) {
        do throws(Failure) { return (try answers(of: script), nil) } catch {
            switch error {
            case .unavailable(let unavailable): throw unavailable
            case .finding(let finding): return (finding.answers, finding)
            }
        }
    }

    func answers(of script: Script, forcing: ForcedError) throws(Failure) -> [Answer] {
        if emulates == nil, script.hasEmulation { emulates = try emulates(privileged: true) }
        let width = child.map { fl_kvm_guest_width($0) } ?? 48
        try begin(OwnPlace(beside: script, width: width), forcing: forcing)
        return try perform(script.lines)
    }

    /// Ends what the last script left and starts the next.
    private func begin(_ place: OwnPlace, forcing: ForcedError) throws(Failure) {
        encoding = CallEncoding(emulates: emulates ?? false, sharedMemory: options.memory)
        guestLayout = GuestLayout(place, width: child.map { fl_kvm_guest_width($0) } ?? 48)
        do throws(Unavailable) {
            if child == nil { try start() }
            var end = fl_kvm_end()
            fl_kvm_begin(child, fl_kvm_place(place), forcing.call, forcing.errno, &end)
            if end.kind != UInt32(fl_kvm_ready) { throw Unavailable(end, path: options.path) }
        } catch {
            abandon()
            throw .unavailable(error)
        }
        isRunning = true
    }

    /// Ends the processes of the last script; otherwise they stay until the next.
    public func finish() {
        guard isRunning, let child else { return }
        var end = fl_kvm_end()
        fl_kvm_finish(child, &end)
        isRunning = false
        if end.kind != UInt32(fl_kvm_ready) { abandon() }
    }

    /// The child answers no more, or can't end what it has started: the next script has another.
    private func abandon() {
        if let child { fl_kvm_stop(child) }
        child = nil
        isRunning = false
    }

    private func perform(_ lines: [Script.Line]) throws(Failure) -> [Answer] {
        var answers: [Answer] = []
        answers.reserveCapacity(lines.count)
        while answers.count < lines.count {
            guard let child else { throw .unavailable(Unavailable(reason: "the child has ended")) }
            let refusals = encoding.encode(lines[answers.count...], fl_kvm_calls(child), fl_kvm_input(child))
            var end = fl_kvm_end()
            fl_kvm_run(child, UInt32(refusals.count), Int32(options.deadline), &end)
            let decoding = AnswerDecoding(words: fl_kvm_output(child), width: fl_kvm_guest_width(child))
            for index in 0..<Int(end.step) {
                let line = lines[answers.count]
                answers.append(
                    refusals[index].map { Answer(.notHere($0)) }
                        ?? decoding.answer(to: line.step, fl_kvm_answers(child)[index]))
            }
            if end.kind != UInt32(fl_kvm_done) {
                let finding = Finding(answers: answers, reason: end.text(deadline: options.deadline))
                isRunning = false
                if end.kind == UInt32(fl_kvm_stuck) || end.kind == UInt32(fl_kvm_broken) { abandon() }
                throw .finding(finding)
            }
        }
        return answers
    }

    // MARK: What the kernel has recorded

    /// Where what the last script had the kernel do can be read, after `finish`, up to the next script: tracefs's text, with
    /// a mark before and after each line, `PROBE line N` and `PROBE line N done`, from 0. Nil: nothing is recorded.
    public var recordingPath: String? {
        guard options.records, let child else { return nil }
        return "/proc/\(fl_kvm_keeper(child))/root/sys/kernel/tracing/instances/"
            + String(cString: fl_kvm_instance(child)) + "/trace"
    }

    /// Where the executor's guest had its code and tables beside the last script.
    public private(set) var guestLayout = GuestLayout(OwnPlace(), width: 48)

    // MARK: What this kernel does

    /// Slots of more pages are asked for, however large, since the cgroup has no memory for their tables; nil: there is no
    /// cgroup, or one that ends processes instead.
    public var refusedPages: UInt64? {
        let pages = child.map { fl_kvm_refused_pages($0) } ?? 0
        return pages == 0 ? nil : pages
    }

    /// KVM's own count of the instructions that it has emulated says whether a guest's code, privileged or not, is. Ends
    /// the last script.
    public func emulates(privileged: Bool) throws(Failure) -> Bool {
        let cpu = CPU(vm: 0, cpu: 0)
        let count = Step.statistics(vm: 0, cpu: 0, names: ["insn_emulation"])
        let steps: [Step] = [
            .host(region: 0, .anonymous, size: 4096, [.read, .write]), .createVM(vm: 0, type: 0),
            .setRegion(
                vm: 0, Region(slot: 0, guestAddress: 0x10000, size: 4096, userAddress: HostPlace(.region(0))),
                version: 1),
            .createCPU(cpu, id: 0), count,
            .guest(cpu, GuestAccess(.write, 0x10000, Repetition(count: 8, stride: 8), emulated: privileged)), count,
        ]
        try begin(OwnPlace(), forcing: .none)
        encoding.emulates = true
        let answers = try perform(steps.map { Script.Line(number: 0, $0) })
        let counts = [answers[4], answers[6]].map { answer -> UInt64? in
            if case .decimal(let value)? = answer.fields.first?.value { value } else { nil }
        }
        guard let before = counts[0], let after = counts[1] else { return false }
        return after - before >= 8
    }

    // MARK: For tests

    /// System calls of the last script, and of the child for itself.
    var callsMade: UInt64 { child.map { fl_kvm_calls_made($0) } ?? 0 }
    var preparationCalls: UInt64 { child.map { fl_kvm_keeper_calls_made($0) } ?? 0 }
    /// Process numbers: the child's, and that of the script's first process.
    var processes: (child: Int32, worker: Int32)? { child.map { (fl_kvm_keeper($0), fl_kvm_worker($0)) } }
    /// Of the last answer of each line of the last batch: how many system calls came before.
    func callsBefore(line: Int) -> UInt64 { child.map { fl_kvm_answers($0)[line].calls_before } ?? 0 }
}

// MARK: One step after another

extension RealRun: Executor {
    /// One step, with a message to the child and back. The executor's own slot lies where no script has one.
    public func perform(_ step: Step, process: Int) -> Answer {
        do throws(Failure) {
            if !isRunning {
                if emulates == nil { emulates = try emulates(privileged: true) }
                try begin(OwnPlace(), forcing: .none)
            }
            return try perform([Script.Line(number: 0, process: process, step)])[0]
        } catch {
            switch error {
            case .unavailable(let unavailable): return Answer(.notHere(unavailable.reason))
            case .finding(let finding): return Answer(.notHere(finding.reason))
            }
        }
    }
}

extension Script {
    fileprivate var hasEmulation: Bool {
        lines.contains { if case .guest(_, let access) = $0.step { access.emulated } else { false } }
    }
}
