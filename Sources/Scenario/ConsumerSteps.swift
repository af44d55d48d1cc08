import Frames
import Machine
import TextInput

/// The steps of those who use the dirty log: pre-copy migration and snapshots.
struct ConsumerBuilder {
    let complaints: Complaints
    private var isMigrating = false
    private var hasSnapshot = false

    init(_ complaints: Complaints) { self.complaints = complaints }

    static let words = ["precopy", "snapshot", "restore"]

    /// Nil: it was complained about.
    mutating func action(_ field: Field, by actor: TaskPlan.Actor, _ answer: AnswerReading) -> Action? {
        guard actor == .background(.vmm) else {
            complaints.add(
                field.keyPosition, "`\(field.key.name)` outside of `vmm:`",
                "one task of the VMM uses the log: put it under `vmm:`")
            return nil
        }
        let action = action(field)
        guard answer.mayBeError || isPossible(action, field) else { return nil }
        switch action {
        case .precopy(.start): (isMigrating, hasSnapshot) = (true, false)
        case .precopy(.stop): isMigrating = false
        case .snapshot(.full): hasSnapshot = true
        default: break
        }
        return action
    }

    private func action(_ field: Field) -> Action {
        let word: String? = if case .words(let words) = field.reading { words.first } else { nil }
        switch field.key.name {
        case "precopy":
            let index = Vocabulary.precopySteps.firstIndex { $0.word == word } ?? 0
            return .precopy(PrecopyStep.allCases[index])
        case "snapshot":
            let index = Vocabulary.snapshotKinds.firstIndex { $0.word == word } ?? 0
            return .snapshot(SnapshotKind.allCases[index])
        default: return .restore
        }
    }

    /// What `Consumers` answers with an error.
    private func isPossible(_ action: Action, _ field: Field) -> Bool {
        let wrong: (String, String)? =
            switch action {
            case .precopy(.start): isMigrating ? ("a second migration", "`precopy: stop` ends the first") : nil
            case .precopy: isMigrating ? nil : ("no migration is running", "`precopy: start` begins one")
            case .snapshot(.full), .snapshot(.difference), .restore:
                isMigrating
                    ? ("a snapshot during a migration", "`precopy: stop` comes before it")
                    : action == .snapshot(.full) || hasSnapshot
                        ? nil
                        : ("there is no snapshot yet", "`snapshot: full` makes one; a migration ends what it began")
            default: nil
            }
        guard let (message, hint) = wrong else { return true }
        complaints.add(field.keyPosition, message, hint)
        return false
    }
}
