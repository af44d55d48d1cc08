// Replay: what a recorded program did with KVM is done again on the model, and what the two tell is compared.
//
// The marks say what was done: slots, guest accesses, host actions. Everything else in the recording is what the kernel made
// of it, and is only compared. The order of a recording's faults decides which vCPU goes on, since it is no more than a
// schedule. Read `ReplayMachine.swift` next.

import Audit
import Frames
import GuestMemory
import HostMemory
import Machine
import TraceAudit

/// One step of a recording: a slot, a guest run, a phase.
public struct ReplayStep: Sendable {
    public var name: String
    public var compared: Int
    public var differences: [ReplayDifference]

    package init(name: String, compared: Int, differences: [ReplayDifference]) {
        self.name = name
        self.compared = compared
        self.differences = differences
    }
}

public struct ReplayReport: Sendable {
    public var file: String
    public var steps: [ReplayStep]
    /// Rules of the model's own that broke.
    public var findings: [String]
    /// What was found in the recording and is not replayed.
    public var leftOut: [String]
    /// What explanations took out of the steps' differences.
    public internal(set) var absorbed: [Absorption] = []

    package init(file: String, steps: [ReplayStep], findings: [String], leftOut: [String]) {
        self.file = file
        self.steps = steps
        self.findings = findings
        self.leftOut = leftOut
    }

    public var compared: Int { steps.reduce(0) { $0 + $1.compared } }
    public var differences: Int { steps.reduce(0) { $0 + $1.differences.count } }
}

public enum ReplayFailure: Error, Sendable {
    case input(AuditInputError)
    case model(ReplayError)
}

/// Replays the recording at `path`, in any form that `audit` reads.
public func replayRecording(path: String) async throws(ReplayFailure) -> ReplayReport {
    let recorded = RecordedRun()
    do throws(AuditInputError) {
        _ = try await auditRecording(RecordingSource(path: path), follower: recorded)
    } catch { throw .input(error) }
    return try replay(recorded, file: path)
}

func replay(_ recorded: RecordedRun, file path: String) throws(ReplayFailure) -> ReplayReport {
    guard !recorded.slots.isEmpty else {
        throw .model(
            ReplayError(description: "\(path): no PROBE mark says what was done; such a recording can only be audited"))
    }
    do throws(ReplayError) {
        let replay = try Replayer(recorded)
        try replay.run()
        return ReplayReport(file: path, steps: replay.steps, findings: replay.findings, leftOut: replay.leftOut)
    } catch { throw .model(error) }
}

/// One replay in progress.
final class Replayer {
    private let recorded: RecordedRun
    private let machine: ReplayMachine
    private var renaming = FrameRenaming()
    private(set) var steps: [ReplayStep] = []
    private(set) var findings: [String] = []
    /// Marks that say something which is not replayed.
    private var unknownMarks = 0
    var leftOut: [String] {
        unknownMarks == 0 ? [] : ["\(unknownMarks) marks of kinds that are not known: what they did is left out"]
    }
    /// Where the walk through the recording stands.
    private var position = 0
    /// The recorded frame of each guest frame when it was last told, and the slots by their numbers.
    private var lastFrames: [UInt64: UInt64] = [:]
    private var slots: [UInt64: SlotRequest] = [:]

    /// A guest run between its two marks.
    private final class Run {
        let run: GuestRun
        init(_ run: GuestRun) { self.run = run }
        var next: UInt64 = 0
        var ending: PagedAccessResult?
        /// The last access has faulted, and the guest has not tried it again yet.
        var isFaulted = false
        var theirs: [ReplayObservation] = []
        var ours: [ReplayObservation] = []

        /// What an access came to; nil: it has faulted.
        func take(_ result: PagedAccessResult?) {
            isFaulted = result == nil
            switch result {
            case nil: break
            case .value, .stored, .emulated: next += 1
            case .mmio, .pageFault, .nestedExit, .failed, .dirtyRingFull: ending = result
            }
        }
    }
    private var runs: [UInt32: Run] = [:]

    /// What is being done by the thread that makes the marks, when no guest runs on it.
    private var pending = Pending.nothing
    private var theirs: [ReplayObservation] = []

    private enum Pending {
        case nothing
        case phase(String, closes: Bool)
        case region(SlotRequest)
        /// The harvest is due, with what it is to find; or done, with what it found.
        case dirtyLog(UInt64, expected: UInt64, found: UInt64?)
    }

    init(_ recorded: RecordedRun) throws(ReplayError) {
        self.recorded = recorded
        machine = try ReplayMachine(recorded)
    }

    func run() throws(ReplayError) {
        for (position, (thread, item)) in recorded.items.enumerated() {
            self.position = position
            switch item {
            case .told(let told):
                try harvestIfItFits()
                hear(told, thread, position)
            case .mark(.getDirtyLog(let slot)):
                try endPhase()
                pending = .dirtyLog(slot, expected: recorded.dirtyPages(after: position), found: nil)
            case .mark(let mark): try obey(mark, thread)
            }
        }
        try endPhase()
        findings = machine.findings.map { "\($0)" }
    }

    // MARK: What the kernel told

    private func hear(_ told: ReplayObservation, _ thread: UInt32, _ position: Int) {
        if case .invalidated(let start, let end) = told.event, !machine.isGuestMemory(start, end) { return }
        if case .set(let guest, _, _) = told.event, let frame = told.frame { lastFrames[guest] = frame }
        guard let run = runs[thread] else {
            theirs.append(told)
            return
        }
        run.theirs.append(told)
        guard case .walk(let address, _) = told.event else { return }
        advance(run, through: address, faultsAgain: recorded.nextWalk(of: thread, after: position) == address)
        run.ours += machine.told()
    }

    /// Lets the vCPU go on until its access to `address` has faulted once more, which is where the recorded one had got to;
    /// if that did not fault again, on until the access is done.
    private func advance(_ run: Run, through address: UInt64, faultsAgain: Bool) {
        let steps = faultsAgain ? 1 : Int.max
        if address == Guest.code(run.run.operation) {
            _ = machine.fetch(run.run, steps: steps)
            return
        }
        let (distance, before) = address.subtractingReportingOverflow(run.run.guestAddress)
        guard !before, run.run.stride > 0, distance % run.run.stride == 0 else { return }
        let index = distance / run.run.stride
        guard index < run.run.count else { return }
        complete(run, below: index)
        guard run.ending == nil, run.next == index else { return }
        if index == 0, !run.isFaulted { _ = machine.fetch(run.run, steps: .max) }
        run.take(machine.access(run.run, index, steps: steps))
    }

    /// Completes every access before that of `index`.
    private func complete(_ run: Run, below index: UInt64) {
        while run.next < index, run.ending == nil {
            if run.next == 0, !run.isFaulted { _ = machine.fetch(run.run, steps: .max) }
            run.take(machine.access(run.run, run.next, steps: .max))
        }
    }

    // MARK: What was done

    private func obey(_ mark: ProbeMark, _ thread: UInt32) throws(ReplayError) {
        switch mark {
        case .scenario, .other: return
        case .action, .line: unknownMarks += 1
        case .phase(let name, let closes):
            try endPhase()
            pending = .phase(name, closes: closes)
        case .setRegion(let request):
            try endPhase()
            pending = .region(request)
        case .setRegionResult(let result): try endRegion(result)
        case .guest(let run):
            try endPhase()
            runs[thread] = Run(run)
        case .guestDone(_, let result, let exit): endRun(thread, result, exit)
        case .getDirtyLog: return
        case .getDirtyLogResult(_, let dirty): try endDirtyLog(dirty)
        }
    }

    private func endPhase() throws(ReplayError) {
        guard case .phase(let name, let closes) = pending else {
            pending = .nothing
            return
        }
        pending = .nothing
        if closes {
            machine.close()
        } else {
            try machine.perform(name, theirs.compactMap(\.range)) { keepsFrames($0) }
        }
        finish("phase \(name)")
    }

    /// Whether a page of the range is found again under the frame that it had: it was unmapped, not given up.
    private func keepsFrames(_ range: Range<UInt64>) -> Bool {
        var frames: [Range<UInt64>] = []
        for slot in slots.values {
            let low = max(range.lowerBound, slot.hostAddress)
            let high = min(range.upperBound, slot.hostAddress + slot.size)
            guard low < high else { continue }
            let first = (slot.guestAddress + low - slot.hostAddress) >> 12
            frames.append(first..<first + (high - low) >> 12)
        }
        for (_, item) in recorded.items[position...] {
            guard case .told(let told) = item, case .set(let guest, _, _) = told.event, let frame = told.frame,
                frames.contains(where: { $0.contains(guest) }), let last = lastFrames[guest]
            else { continue }
            return frame == last
        }
        return false
    }

    private func endRegion(_ result: Int64) throws(ReplayError) {
        guard case .region(let request) = pending else { return }
        pending = .nothing
        let error = try machine.setRegion(request)
        if result == 0 { slots[request.slot] = request.size > 0 ? request : nil }
        var comparison = Comparison()
        comparison.compare("KVM_SET_USER_MEMORY_REGION", recorded: "\(result)", model: error == nil ? "0" : "-1")
        finish("set_region slot \(request.slot)", comparison)
    }

    /// vCPUs run on while the log is harvested: somewhere between the call's two marks. Where the pages that are dirty in
    /// the model are as many as the kernel reported, the model harvests; if nowhere, at the end.
    private func harvestIfItFits() throws(ReplayError) {
        guard case .dirtyLog(let slot, let expected, nil) = pending, !runs.isEmpty else { return }
        guard machine.dirtyCount(slot) == expected else { return }
        pending = .dirtyLog(slot, expected: expected, found: try machine.dirtyPages(slot))
    }

    private func endDirtyLog(_ dirty: UInt64) throws(ReplayError) {
        guard case .dirtyLog(let slot, _, let found) = pending else { return }
        pending = .nothing
        let pages: UInt64
        if let found { pages = found } else { pages = try machine.dirtyPages(slot) }
        var comparison = Comparison()
        comparison.compare("dirty pages of slot \(slot)", recorded: "\(dirty)", model: "\(pages)")
        finish("get_dirty_log slot \(slot)", comparison)
    }

    private func finish(_ name: String, _ begun: Comparison = Comparison()) {
        var comparison = begun
        add(name, &comparison, theirs, machine.told())
        theirs = []
    }

    private func endRun(_ thread: UInt32, _ result: Int64, _ exit: Int64) {
        guard let run = runs.removeValue(forKey: thread) else { return }
        complete(run, below: run.run.count)
        let found: (result: Int64, exit: Int64)
        switch run.ending {
        case .mmio:
            machine.endWithMMIO(run.run)
            found = (0, 6)
        case .failed: found = (-1, 0)
        case .pageFault: found = (0, 8)
        default:
            machine.endWithOut(run.run)
            found = (0, 2)
        }
        var comparison = Comparison()
        comparison.compare("KVM_RUN", recorded: "\(result), exit \(exit)", model: "\(found.result), exit \(found.exit)")
        let name = "guest vcpu \(run.run.vcpu) \(run.run.operation.rawValue) \(String(run.run.guestAddress, radix: 16))"
        add(name, &comparison, run.theirs, run.ours + machine.told())
    }

    private func add(
        _ name: String, _ comparison: inout Comparison, _ theirs: [ReplayObservation], _ ours: [ReplayObservation]
    ) {
        let ours = ours.filter { observation in
            if !recorded.hasElements, observation.event.isStepOfWalk { return false }
            if let range = observation.range { return machine.isGuestMemory(range.lowerBound, range.upperBound) }
            return true
        }
        comparison.compare(theirs, ours, &renaming)
        steps.append(ReplayStep(name: name, compared: comparison.compared, differences: comparison.differences))
    }
}

extension ReplayObservation {
    /// The range of an invalidation.
    package var range: Range<UInt64>? {
        guard case .invalidated(let start, let end) = event, start < end else { return nil }
        return start..<end
    }
}
