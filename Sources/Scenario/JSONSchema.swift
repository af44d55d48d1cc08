import Machine

/// The JSON Schema (draft 2020-12) of the scenario language, for editors: completion, documentation on hover, and red
/// underlines. Strict: a key that the vocabulary doesn't have is an error. What parts mean together (overlaps, sizes
/// that don't fit) only the loader knows.
public func jsonSchema() -> String {
    let definitions = SchemaWriter.placesWithKeys.map { (SchemaWriter.name($0), SchemaWriter.definition($0)) }
    let schema = JSON.object([
        ("$schema", .string("https://json-schema.org/draft/2020-12/schema")),
        ("title", .string("Faultline scenario")),
        ("description", .string("A guest-memory situation: host memory, a VM, what happens, what is expected.")),
        ("$ref", .string("#/$defs/\(SchemaWriter.name(.scenario))")),
        ("$defs", .object(definitions + SchemaWriter.answerDefinitions)),
    ])
    return schema.text() + "\n"
}

private enum SchemaWriter {
    static let placesWithKeys: [Place] = [
        .scenario, .host, .region, .vm, .slot, .phase, .guestStep, .hostStep, .outcome, .statistics, .known,
    ]

    static func name(_ place: Place) -> String { "\(place)" }
    static func reference(_ name: String) -> JSON { .object([("$ref", .string("#/$defs/\(name)"))]) }

    static func definition(_ place: Place) -> JSON {
        switch place {
        case .guestStep, .hostStep:
            let actions = Vocabulary.actions(of: place)
            let alone = actions.filter { $0.type.mayBeNothing }.map { JSON.string($0.name) }
            let words: [JSON] = alone.isEmpty ? [] : [.object([("enum", .array(alone))])]
            return .object([("oneOf", .array(words + actions.map { step($0, place) }))])
        default: return mapping(Vocabulary.keys(of: place))
        }
    }

    private static func step(_ action: Key, _ place: Place) -> JSON {
        let shape = action.step ?? StepShape()
        let parameters = shape.parameters.compactMap { Vocabulary.parameter($0, of: place) }
        return mapping([action] + parameters, answers: shape.answers)
    }

    private static func mapping(_ keys: [Key], answers: [Answer] = []) -> JSON {
        func members(_ keys: [Key]) -> [(String, JSON)] {
            keys.map { key in
                let name = key.numbered ? "^\(key.name)(0|[1-9][0-9]*)$" : key.name
                return (name, .object([("description", .string(description(key)))] + schema(key.type, answers)))
            }
        }
        var object: [(String, JSON)] = [
            ("type", .string("object")),
            ("properties", .object(members(keys.filter { !$0.numbered }))),
        ]
        let numbered = keys.filter(\.numbered)
        if !numbered.isEmpty { object.append(("patternProperties", .object(members(numbered)))) }
        let required = keys.filter(\.isRequired).map { JSON.string($0.name) }
        if !required.isEmpty { object.append(("required", .array(required))) }
        object.append(("additionalProperties", .bool(false)))
        return .object(object)
    }

    private static func description(_ key: Key) -> String {
        var text = key.meaning
        if case .optional(let otherwise) = key.necessity, !otherwise.isEmpty { text += "; default: \(otherwise)" }
        return text + ". Example: \(key.example)"
    }

    /// An integer, or a text that is written as `pattern` says; editors read hexadecimal as either.
    private static func quantity(_ pattern: String, _ range: ClosedRange<UInt64>) -> [(String, JSON)] {
        var members: [(String, JSON)] = [
            ("type", .array([.string("integer"), .string("string")])),
            ("pattern", .string("^\(pattern)$")),
            ("minimum", .number(range.lowerBound)),
        ]
        if range.upperBound != .max { members.append(("maximum", .number(range.upperBound))) }
        return members
    }

    private static func text(_ pattern: String) -> [(String, JSON)] {
        [("type", .string("string")), ("pattern", .string("^\(pattern)$"))]
    }

    private static func array(of item: [(String, JSON)]) -> [(String, JSON)] {
        [("type", .string("array")), ("items", .object(item))]
    }

    private static func schema(_ type: ValueType, _ answers: [Answer]) -> [(String, JSON)] {
        switch type {
        case .text: return [("type", .array([.string("string"), .string("number"), .string("boolean")]))]
        case .name: return text(Quantity.namePattern)
        case .flag: return [("type", .string("boolean"))]
        case .number(let range): return quantity(Quantity.numberPattern, range)
        case .slotID: return quantity(Quantity.numberPattern, Vocabulary.slotIDs)
        case .size: return quantity(Quantity.sizePattern, Vocabulary.word)
        case .userAddress: return quantity(Quantity.numberPattern, Vocabulary.word)
        case .guestPlace:
            return quantity("(\(Quantity.numberPattern)|\(Quantity.regionPlacePattern))", Vocabulary.word)
        case .choice(let choices): return [("enum", .array(choices.map { .string($0.word) }))]
        case .choices(let choices):
            return array(of: [("enum", .array(choices.map { .string($0.word) }))]) + [("uniqueItems", .bool(true))]
        case .region: return text(Quantity.namePattern)
        case .regionPlace: return text(Quantity.regionPlacePattern)
        case .mapping(let place): return [("$ref", .string("#/$defs/\(name(place))"))]
        case .list(let place): return array(of: [("$ref", .string("#/$defs/\(name(place))"))])
        case .answer: return [("$ref", .string("#/$defs/\(answerName(answers))"))]
        case .pages: return array(of: quantity(Quantity.numberPattern, Vocabulary.word))
        case .counter: return counter
        case .rules: return array(of: text("(expect|(I-|X|RV-)[0-9]+)"))
        case .nothing: return [("type", .string("null"))]
        }
    }

    private static var counter: [(String, JSON)] {
        let value = JSON.object(quantity(Quantity.numberPattern, Vocabulary.word))
        return [("oneOf", .array([value, perArchitecture(value, also: [])]))]
    }

    private static func perArchitecture(_ value: JSON, also others: [String]) -> JSON {
        .object([
            ("type", .string("object")),
            ("properties", .object((Vocabulary.architectureWords + others).map { ($0, value) })),
            ("minProperties", .number(1)),
            ("additionalProperties", .bool(false)),
        ])
    }

    // MARK: Answers

    /// One definition for each set of answers that some action may give.
    static var answerDefinitions: [(String, JSON)] {
        var definitions: [(String, JSON)] = []
        for key in Vocabulary.keys {
            guard let answers = key.step?.answers else { continue }
            let name = answerName(answers)
            guard !definitions.contains(where: { $0.0 == name }) else { continue }
            definitions.append((name + "-single", .object([("oneOf", .array(singleAnswers(answers)))])))
            definitions.append((name + "-plain", .object([("oneOf", .array(plainAnswers(answers, name + "-single")))])))
            let one = reference(name + "-plain")
            definitions.append(
                (name, .object([("oneOf", .array([one, perArchitecture(one, also: ["otherwise"])]))])))
        }
        return definitions
    }

    private static func answerName(_ answers: [Answer]) -> String {
        "answer-" + Answer.allInOrder.filter(answers.contains).map { "\($0)" }.joined(separator: "-")
    }

    /// A single answer, `anything`, or several.
    private static func plainAnswers(_ answers: [Answer], _ single: String) -> [JSON] {
        var schemas = [reference(single)]
        if answers.contains(.anything) { schemas.append(.object([("enum", .array([.string("anything")]))])) }
        if answers.contains(.anyOf) {
            let list: [(String, JSON)] = [
                ("type", .string("array")), ("items", reference(single)), ("minItems", .number(2)),
                ("uniqueItems", .bool(true)),
            ]
            schemas.append(answerMapping("any_of", list))
        }
        return schemas
    }

    private static func answerMapping(_ name: String, _ value: [(String, JSON)]) -> JSON {
        .object([
            ("type", .string("object")),
            ("properties", .object([(name, .object(value))])),
            ("required", .array([.string(name)])),
            ("additionalProperties", .bool(false)),
        ])
    }

    private static func singleAnswers(_ answers: [Answer]) -> [JSON] {
        var words: [JSON] = []
        if answers.contains(.ok) { words.append(.string("ok")) }
        if answers.contains(.mmio) { words.append(.string("mmio")) }
        if answers.contains(.dirtyRingFull) { words.append(.string("dirty_ring_full")) }
        if answers.contains(.memoryFault) { words.append(.string("memory_fault")) }
        if answers.contains(.pageFault) { words.append(.string("page_fault")) }
        if answers.contains(.errno) { words += Vocabulary.errors.map { .string("\($0)") } }
        var schemas: [JSON] = [.object([("enum", .array(words))])]
        if answers.contains(.value) { schemas.append(.object(quantity(Quantity.numberPattern, Vocabulary.word))) }
        for (answer, name) in [(Answer.pages, "pages"), (.counting, "counting_from")] where answers.contains(answer) {
            guard let key = Vocabulary.keys(of: .answer).first(where: { $0.name == name }) else { continue }
            schemas.append(answerMapping(name, schema(key.type, [])))
        }
        return schemas
    }
}

extension ValueType {
    /// Whether the key may stand alone: `- fork`.
    var mayBeNothing: Bool {
        if case .nothing = self { return true }
        if case .choice(let choices) = self { return choices.count == 1 }
        return false
    }
}
