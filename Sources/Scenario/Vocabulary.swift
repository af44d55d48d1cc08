// The words of the scenario language. Every key stands once in the tables of this type: what it is called, where it
// stands, what its value is, what it means. The reader's checks, its error messages, the JSON Schema for editors and
// the reference page are all made from them; a key that isn't here doesn't exist.

import Machine

/// Where a key stands: the mapping that it belongs to.
enum Place: Sendable, Hashable {
    case scenario, host, region, vm, slot, phase, guestStep, hostStep, answer, outcome, statistics, known

    /// For messages: "… is not a key of a region".
    var noun: String {
        switch self {
        case .scenario: "a scenario"
        case .host: "`host`"
        case .region: "a region"
        case .vm: "`vm`"
        case .slot: "a slot"
        case .phase: "a phase"
        case .guestStep: "a step of a vCPU"
        case .hostStep: "a step of the host"
        case .answer: "a step's `expect`"
        case .outcome: "the scenario's `expect`"
        case .statistics: "`statistics`"
        case .known: "`known`"
        }
    }
}

/// What a key's value may be.
enum ValueType: Sendable {
    case text
    /// A word to refer to: letters, digits, `-` and `_`, a letter first.
    case name
    case flag
    /// A number in this range.
    case number(ClosedRange<UInt64>)
    /// Bytes.
    case size
    /// A host user address.
    case userAddress
    /// A guest physical address, or a place in a region that a slot shows to the guest.
    case guestPlace
    case choice([Choice])
    case choices([Choice])
    /// The name of a region.
    case region
    /// A region's name, perhaps with an offset in bytes: `ram+0x1000`.
    case regionPlace
    case slotID
    case mapping(Place)
    case list(Place)
    case answer
    /// Ascending page numbers.
    case pages
    /// A counter's value, perhaps one per architecture.
    case counter
    /// Rule codes and `expect`.
    case rules
    /// Nothing follows: the key stands alone.
    case nothing
}

/// A word that may be a value.
struct Choice: Sendable {
    let word: String
    let meaning: String
    init(_ word: String, _ meaning: String) {
        self.word = word
        self.meaning = meaning
    }
}

/// What a step may give.
enum Answer: Sendable, Hashable {
    case ok, mmio, dirtyRingFull, memoryFault, pageFault, errno, value, counting, pages, anyOf, anything
}

/// What makes a key the action of a step.
struct StepShape: Sendable {
    /// The other keys of such a step.
    var parameters: [String] = []
    var answers: [Answer] = [.ok, .errno]
    /// The region kinds that it is possible on.
    var kinds: [RegionKind] = RegionKind.allCases
    /// On other kinds Linux answers with an error, so a step that expects one may try.
    var triesOtherKinds = false
}

struct Key: Sendable {
    enum Necessity: Sendable {
        case required
        /// May be left out; the text says what holds then.
        case optional(String)
    }
    let name: String
    let place: Place
    let type: ValueType
    let necessity: Necessity
    let meaning: String
    let example: String
    /// `vcpu` stands for `vcpu0`, `vcpu1`, ...
    var numbered = false
    /// If the key is a step's action.
    var step: StepShape? = nil

    init(
        _ name: String, _ place: Place, _ type: ValueType, _ necessity: Necessity, _ meaning: String, example: String,
        numbered: Bool = false, step: StepShape? = nil
    ) {
        self.name = name
        self.place = place
        self.type = type
        self.necessity = necessity
        self.meaning = meaning
        self.example = example
        self.numbered = numbered
        self.step = step
    }

    var isRequired: Bool { if case .required = necessity { true } else { false } }
    /// As a reader writes it.
    var shownName: String { numbered ? "\(name)0" : name }

    func matches(_ word: String) -> Bool {
        guard numbered else { return word == name }
        return word.hasPrefix(name) && Vocabulary.decimal(word.dropFirst(name.count)) != nil
    }
}

enum Vocabulary {
    static let keys: [Key] = situation + steps + answers

    static func keys(of place: Place) -> [Key] { keys.filter { $0.place == place } }
    static func actions(of place: Place) -> [Key] { keys(of: place).filter { $0.step != nil } }

    /// A parameter of a step.
    static func parameter(_ name: String, of place: Place) -> Key? {
        keys.first { $0.place == place && $0.step == nil && $0.name == name }
    }

    /// A number without sign and without leading zeros.
    static func decimal(_ text: some StringProtocol) -> UInt64? {
        guard text.utf8.allSatisfy({ (0x30...0x39).contains($0) }), text.utf8.first != 0x30 || text.utf8.count == 1
        else { return nil }
        return UInt64(text)
    }
}
