import Machine
import TextInput

/// The first stage: reads elements as the vocabulary says. After it every key is known and every value of its type;
/// what the values mean together is the next stage's.
struct ShapeReader {
    let complaints: Complaints

    func fields(_ element: Element, as place: Place) -> Fields {
        guard case .mapping(let entries) = element.content else {
            complaints.add(
                element.position, "expected \(place.noun), found \(element.kind)",
                "\(place.noun) is a mapping: \(shownKeys(Vocabulary.keys(of: place)))")
            return Fields(place: place, position: element.position)
        }
        let keys = Vocabulary.keys(of: place)
        var fields = Fields(place: place, position: element.position)
        for entry in entries {
            guard let key = keys.first(where: { $0.matches(entry.key) }) else {
                unknown(entry, among: keys, noun: place.noun)
                continue
            }
            append(entry, key, to: &fields)
        }
        for key in keys where key.isRequired && !entries.contains(where: { key.matches($0.key) }) {
            complaints.add(
                element.position, "\(place.noun) needs `\(key.name)`",
                "`\(key.name)` is \(key.meaning), for example `\(key.name): \(key.example)`")
        }
        return fields
    }

    private func append(_ entry: Element.Entry, _ key: Key, to fields: inout Fields, answers: [Answer] = []) {
        guard let reading = read(entry.value, of: key, answers: answers) else { return }
        fields.fields.append(
            Field(
                key: key, word: entry.key, keyPosition: entry.keyPosition, position: entry.value.position,
                reading: reading))
    }

    func unknown(_ entry: Element.Entry, among keys: [Key], noun: String) {
        let names = keys.map(\.shownName)
        let suggestion = nearest(entry.key, in: names).map { "did you mean `\($0)`? " } ?? ""
        complaints.add(
            entry.keyPosition, "`\(entry.key)` is not a key of \(noun)",
            suggestion + "\(noun) has: \(shownKeys(keys))")
    }

    func shownKeys(_ keys: [Key]) -> String { keys.map(\.shownName).joined(separator: ", ") }

    func list(_ element: Element, of place: Place) -> [Fields]? {
        guard case .list(let elements) = element.content else {
            complaints.add(
                element.position, "expected a list, found \(element.kind)",
                "each item begins with `- ` and is \(place.noun)")
            return nil
        }
        let isStep = place == .guestStep || place == .hostStep
        return elements.map { isStep ? step($0, as: place) : fields($0, as: place) }
    }

    // MARK: Steps

    /// A step is a mapping of its action and the action's parameters, or the action's name alone.
    private func step(_ element: Element, as place: Place) -> Fields {
        var fields = Fields(place: place, position: element.position)
        let entries: [Element.Entry]
        switch element.content {
        case .mapping(let mapping): entries = mapping
        case .scalar(let word, false):
            let nothing = Element(position: element.position, content: .nothing)
            entries = [Element.Entry(key: word, keyPosition: element.position, value: nothing)]
        default: entries = []
        }
        guard let (action, shape) = action(of: entries, element, place) else { return fields }
        let parameters = shape.parameters.compactMap { Vocabulary.parameter($0, of: place) }
        for entry in entries {
            if entry.key == action.name {
                append(entry, action, to: &fields)
            } else if let key = parameters.first(where: { $0.name == entry.key }) {
                append(entry, key, to: &fields, answers: shape.answers)
            } else {
                unknown(entry, among: [action] + parameters, noun: "a `\(action.name)` step")
            }
        }
        for key in parameters where key.isRequired && !entries.contains(where: { $0.key == key.name }) {
            complaints.add(
                element.position, "a `\(action.name)` step needs `\(key.name)`",
                "`\(key.name)` is \(key.meaning), for example `\(key.name): \(key.example)`")
        }
        return fields
    }

    private func action(of entries: [Element.Entry], _ element: Element, _ place: Place) -> (Key, StepShape)? {
        let actions = Vocabulary.actions(of: place)
        let named = entries.compactMap { entry in actions.first { $0.name == entry.key }.map { (entry, $0) } }
        if named.count > 1 {
            let (entry, key) = named[1]
            complaints.add(
                entry.keyPosition, "a step with two actions, `\(named[0].1.name)` and `\(key.name)`",
                "begin a step of its own: `- \(key.name): ...`")
            return nil
        }
        if let key = named.first?.1, let shape = key.step { return (key, shape) }
        noAction(entries, element, place, actions)
        return nil
    }

    private func noAction(_ entries: [Element.Entry], _ element: Element, _ place: Place, _ actions: [Key]) {
        let list = "\(place.noun) is one of: \(shownKeys(actions))"
        guard let entry = entries.first else {
            complaints.add(element.position, "expected \(place.noun), found \(element.kind)", list)
            return
        }
        let other: Place = place == .guestStep ? .hostStep : .guestStep
        if let elsewhere = Vocabulary.actions(of: other).first(where: { $0.name == entry.key }) {
            let counterpart = ["write": "store", "read": "load", "store": "write", "load": "read"][entry.key]
            let instead = counterpart.map { "use `\($0)` here, or " } ?? ""
            complaints.add(
                entry.keyPosition, "`\(entry.key)` is \(other.noun), not \(place.noun)",
                instead + "put it under \(other == .hostStep ? "`host:`" : "`vcpu0:`") (\(elsewhere.meaning))")
            return
        }
        let suggestion = nearest(entry.key, in: actions.map(\.name)).map { "did you mean `\($0)`? " } ?? ""
        complaints.add(entry.keyPosition, "`\(entry.key)` is not \(place.noun)", suggestion + list)
    }
}
