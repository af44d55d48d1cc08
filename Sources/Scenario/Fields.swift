import Audit
import Machine
import TextInput

/// What a value was read as; which case it is follows from the key's `ValueType`.
indirect enum Reading {
    case text(String)
    case flag(Bool)
    case number(UInt64)
    case words([String])
    case regionPlace(RegionPlace)
    case guestPlace(GuestPlace)
    case fields(Fields)
    case list([Fields])
    case answer(AnswerReading)
    case pages([UInt64])
    case counter([CounterReading])
    case rules(invariants: [Invariant], expectation: Bool)
    case nothing
}

/// What a step must give, on each architecture.
struct AnswerReading {
    var expectation: StepExpectation
    var exceptions: [ArchitectureExpectation] = []

    /// All that may come of the step, on any architecture.
    var all: [StepExpectation] {
        expectation.alternatives + exceptions.flatMap { $0.expectation.alternatives }
    }
    /// Whether it may be an access outside of memory: of a device, or the guest's own fault.
    var mayMissMemory: Bool { all.contains(.mmio) || all.contains(.pageFault) }
    var mayBeError: Bool {
        all.contains { if case .error = $0 { true } else { false } }
    }
    func on(_ architecture: Architecture) -> StepExpectation {
        exceptions.first { $0.architectures.contains(architecture) }?.expectation ?? expectation
    }
}

struct CounterReading {
    var architectures: ArchitectureSet
    var value: UInt64
}

/// A key with its value, checked against the vocabulary.
struct Field {
    var key: Key
    /// The key as written: `vcpu1`.
    var word: String
    var keyPosition: Position
    var position: Position
    var reading: Reading
}

/// A mapping, checked against the vocabulary: no unknown key, no key missing, each value of its type.
struct Fields {
    var place: Place
    var position: Position
    var fields: [Field] = []

    subscript(_ name: String) -> Field? { fields.first { $0.key.name == name } }

    /// A step's action.
    var action: Field? { fields.first { $0.key.step != nil } }

    func number(_ name: String) -> UInt64? {
        if case .number(let value)? = self[name]?.reading { value } else { nil }
    }
    func text(_ name: String) -> String? {
        if case .text(let value)? = self[name]?.reading { value } else { nil }
    }
    func flag(_ name: String) -> Bool {
        if case .flag(let value)? = self[name]?.reading { value } else { false }
    }
    func words(_ name: String) -> [String] {
        if case .words(let value)? = self[name]?.reading { value } else { [] }
    }
    func regionPlace(_ name: String) -> RegionPlace? {
        if case .regionPlace(let value)? = self[name]?.reading { value } else { nil }
    }
    func fields(_ name: String) -> Fields? {
        if case .fields(let value)? = self[name]?.reading { value } else { nil }
    }
    func list(_ name: String) -> [Fields] {
        if case .list(let value)? = self[name]?.reading { value } else { [] }
    }
    /// Where to point for what `name` says, or would say.
    func position(of name: String) -> Position { self[name]?.position ?? position }
}
