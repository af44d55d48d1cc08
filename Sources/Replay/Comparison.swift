/// Where the recorded kernel and the model differ.
public struct ReplayDifference: Sendable, Equatable {
    public enum Kind: String, Sendable, Codable {
        /// The kernel told it, the model did not.
        case missing
        /// The model told it, the kernel did not.
        case extra
        /// Both told it, but of frames that do not correspond.
        case frame
        /// The result of a call or a run.
        case result
    }
    public var kind: Kind
    /// What it is about, much as the kernel prints it.
    public var text: String
    /// What else is known: the other side's result, the frames.
    public var detail: String
}

/// Two accounts of the same step, side by side.
package struct Comparison {
    package private(set) var compared = 0
    package private(set) var differences: [ReplayDifference] = []

    package init() {}

    /// Compares in order. Where the two part, the nearest place is looked for where they agree again.
    package mutating func compare(
        _ recorded: [ReplayObservation], _ model: [ReplayObservation], _ renaming: inout FrameRenaming
    ) {
        var i = 0
        var j = 0
        while i < recorded.count || j < model.count {
            if i < recorded.count, j < model.count, recorded[i].event == model[j].event {
                compared += 1
                compareFrames(recorded[i], model[j], &renaming)
                i += 1
                j += 1
                continue
            }
            let (skipI, skipJ) = Self.nextAgreement(recorded[i...], model[j...])
            for k in i..<i + skipI { note(.missing, recorded[k]) }
            for k in j..<j + skipJ { note(.extra, model[k]) }
            i += skipI
            j += skipJ
        }
    }

    /// How many to leave out on each side, so that what follows agrees again: as few as can be, looking up to 64 ahead.
    private static func nextAgreement(
        _ recorded: ArraySlice<ReplayObservation>, _ model: ArraySlice<ReplayObservation>
    ) -> (Int, Int) {
        let reach = 64
        for total in 1..<2 * reach {
            for a in max(0, total - reach)...min(total, reach) {
                let b = total - a
                guard a < recorded.count, b < model.count else { continue }
                if recorded[recorded.startIndex + a].event == model[model.startIndex + b].event { return (a, b) }
            }
        }
        return (min(recorded.count, reach), min(model.count, reach))
    }

    private mutating func note(_ kind: ReplayDifference.Kind, _ observation: ReplayObservation) {
        compared += 1
        differences.append(ReplayDifference(kind: kind, text: observation.event.description, detail: ""))
    }

    private mutating func compareFrames(
        _ recorded: ReplayObservation, _ model: ReplayObservation, _ renaming: inout FrameRenaming
    ) {
        guard let theirs = recorded.frame, let ours = model.frame else { return }
        switch recorded.event {
        case .set(let guest, _, let level):
            compared += 1
            // Of a large entry the first page stands for all: the two are as long.
            if level > 1 { renaming.forget { $0 >> 9 == guest >> 9 } }
            guard !renaming.note(guest, recorded: theirs, model: ours) else { return }
        default: return
        }
        differences.append(
            ReplayDifference(
                kind: .frame, text: recorded.event.description,
                detail: "pfn \(String(theirs, radix: 16)) there, \(String(ours, radix: 16)) here"))
    }

    package mutating func compare(_ what: String, recorded: String, model: String) {
        compared += 1
        guard recorded != model else { return }
        differences.append(ReplayDifference(kind: .result, text: what, detail: "\(recorded) there, \(model) here"))
    }
}
