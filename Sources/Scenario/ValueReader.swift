import Audit
import Frames
import Machine
import TextInput

// Reading one value as its key's type says. Each function returns nil after it has complained.

extension ShapeReader {
    func read(_ element: Element, of key: Key, answers: [Answer]) -> Reading? {
        switch key.type {
        case .text: return scalar(element, key).map(Reading.text)
        case .name: return name(element, key)
        case .flag: return flag(element, key)
        case .number(let range): return number(element, key, range)
        case .slotID: return number(element, key, Vocabulary.slotIDs)
        case .size: return size(element, key)
        case .userAddress: return number(element, key, 0...UserAddress.end.value)
        case .region, .regionPlace: return regionPlace(element, key)
        case .guestPlace: return guestPlace(element, key)
        case .choice(let choices): return choice(element, key, choices)
        case .choices(let choices): return self.choices(element, key, choices)
        case .mapping(let place): return Reading.fields(fields(element, as: place))
        case .list(let place): return list(element, of: place).map(Reading.list)
        case .answer: return answer(element, answers).map(Reading.answer)
        case .pages: return pages(element).map(Reading.pages)
        case .counter: return counter(element, key)
        case .rules: return rules(element, key)
        case .nothing:
            guard case .nothing = element.content else {
                complaints.add(
                    element.position, "`\(key.name)` takes no value, found \(element.kind)", "write `- \(key.name)`")
                return nil
            }
            return .nothing
        }
    }

    private func scalar(_ element: Element, _ key: Key) -> String? {
        guard case .scalar(let text, _) = element.content else { return wrong(element, key) }
        return text
    }

    private func wrong<Value>(_ element: Element, _ key: Key) -> Value? {
        complaints.add(
            element.position, "`\(key.name)` can't be \(element.kind)", "\(key.type.expected); \(exampleOf(key))")
        return nil
    }

    private func exampleOf(_ key: Key) -> String { "for example `\(key.name): \(key.example)`" }

    private func name(_ element: Element, _ key: Key) -> Reading? {
        guard let text = scalar(element, key) else { return nil }
        guard Quantity.isName(text) else { return wrong(element, key) }
        return .text(text)
    }

    private func flag(_ element: Element, _ key: Key) -> Reading? {
        switch element.content {
        case .scalar("true", quoted: false): return .flag(true)
        case .scalar("false", quoted: false): return .flag(false)
        default: return wrong(element, key)
        }
    }

    private func number(_ element: Element, _ key: Key, _ range: ClosedRange<UInt64>) -> Reading? {
        guard let text = scalar(element, key) else { return nil }
        guard let value = Quantity.number(text) else { return wrong(element, key) }
        guard range.contains(value) else {
            complaints.add(
                element.position, "`\(key.name)` can't be \(text)",
                "it is at least \(range.lowerBound) and at most \(range.upperBound)")
            return nil
        }
        return .number(value)
    }

    private func size(_ element: Element, _ key: Key) -> Reading? {
        guard let text = scalar(element, key) else { return nil }
        guard let bytes = Quantity.size(text) else { return wrong(element, key) }
        return .number(bytes)
    }

    private func regionPlace(_ element: Element, _ key: Key) -> Reading? {
        guard let text = scalar(element, key) else { return nil }
        guard let place = Quantity.regionPlace(text) else { return wrong(element, key) }
        if case .region = key.type, text.contains("+") { return wrong(element, key) }
        return .regionPlace(place)
    }

    private func guestPlace(_ element: Element, _ key: Key) -> Reading? {
        guard let text = scalar(element, key) else { return nil }
        guard let place = Quantity.guestPlace(text) else { return wrong(element, key) }
        return .guestPlace(place)
    }

    private func choice(_ element: Element, _ key: Key, _ choices: [Choice]) -> Reading? {
        if case .nothing = element.content, key.step != nil { return .nothing }
        guard let text = scalar(element, key), let word = known(text, at: element.position, key, choices) else {
            return nil
        }
        return .words([word])
    }

    private func choices(_ element: Element, _ key: Key, _ choices: [Choice]) -> Reading? {
        guard case .list(let elements) = element.content else { return wrong(element, key) }
        var words: [String] = []
        for each in elements {
            guard let text = scalar(each, key), let word = known(text, at: each.position, key, choices) else {
                continue
            }
            if words.contains(word) {
                complaints.add(each.position, "`\(word)` is given twice", "keep one of them")
            }
            words.append(word)
        }
        return .words(words)
    }

    private func known(_ word: String, at position: Position, _ key: Key, _ choices: [Choice]) -> String? {
        let words = choices.map(\.word)
        if words.contains(word) { return word }
        let suggestion = nearest(word, in: words).map { "did you mean `\($0)`? " } ?? ""
        complaints.add(
            position, "`\(key.name)` can't be `\(word)`",
            suggestion + "expected one of: \(words.joined(separator: ", "))")
        return nil
    }

    func pages(_ element: Element) -> [UInt64]? {
        guard case .list(let elements) = element.content else {
            complaints.add(
                element.position, "expected a list of page numbers, found \(element.kind)",
                "for example `pages: [0, 3]`; `pages: []` for none")
            return nil
        }
        var pages: [UInt64] = []
        for each in elements {
            guard case .scalar(let text, _) = each.content, let page = Quantity.number(text) else {
                complaints.add(each.position, "a page number can't be \(each.kind)", "for example `pages: [0, 3]`")
                return nil
            }
            guard pages.last.map({ $0 < page }) ?? true else {
                complaints.add(each.position, "page \(page) after page \(pages[pages.count - 1])", "list pages upwards")
                return nil
            }
            pages.append(page)
        }
        return pages
    }

    /// A counter's value, or a mapping of architectures to values.
    private func counter(_ element: Element, _ key: Key) -> Reading? {
        guard case .mapping(let entries) = element.content else {
            guard case .scalar(let text, _) = element.content, let value = Quantity.number(text) else {
                return wrong(element, key)
            }
            return .counter([CounterReading(architectures: .all, value: value)])
        }
        var counters: [CounterReading] = []
        var seen: ArchitectureSet = []
        for entry in entries {
            guard let set = Vocabulary.architectureSet(entry.key) else {
                complaints.add(
                    entry.keyPosition, "`\(entry.key)` is not an architecture",
                    "expected one of: \(Vocabulary.architectureWords.joined(separator: ", "))")
                continue
            }
            guard case .scalar(let text, _) = entry.value.content, let value = Quantity.number(text) else {
                return wrong(entry.value, key)
            }
            guard seen.isDisjoint(with: set) else {
                complaints.add(entry.keyPosition, "`\(entry.key)` has two values", "name each architecture once")
                continue
            }
            seen.formUnion(set)
            counters.append(CounterReading(architectures: set, value: value))
        }
        return .counter(counters)
    }

    private func rules(_ element: Element, _ key: Key) -> Reading? {
        guard case .list(let elements) = element.content else { return wrong(element, key) }
        var invariants: [Invariant] = []
        var expectation = false
        for each in elements {
            guard case .scalar(let text, _) = each.content else { return wrong(each, key) }
            if text == "expect" {
                expectation = true
            } else if let rule = Invariant.allCases.first(where: { "\($0.family)\($0.number)" == text }) {
                if invariants.contains(rule) { complaints.add(each.position, "`\(text)` is given twice", "keep one") }
                invariants.append(rule)
            } else {
                complaints.add(
                    each.position, "`\(text)` is not a rule",
                    "a rule is written as in the specification: I-5, X19, RV-2; `expect` is an unmet expectation")
            }
        }
        return .rules(invariants: invariants, expectation: expectation)
    }
}

extension ValueType {
    /// What a value of this type is, for messages and the reference page.
    var expected: String {
        switch self {
        case .text: "a text"
        case .name: "a name of letters, digits, `-` and `_`, a letter first"
        case .flag: "`true` or `false`"
        case .number(let range):
            range.upperBound == .max ? "a number" : "a number from \(range.lowerBound) to \(range.upperBound)"
        case .slotID: "a slot's id"
        case .size: "a size: `64 KiB`, `2 MiB`, `4096`, `0x1000`"
        case .userAddress: "a host virtual address: `0x7f0000000000`"
        case .region: "the name of a region"
        case .regionPlace: "a region, perhaps with an offset: `ram`, `ram+0x1000`"
        case .guestPlace: "a guest physical address or a place in a region: `0x10000000`, `ram+0x1000`"
        case .choice(let choices): "one of: " + choices.map { "`\($0.word)`" }.joined(separator: ", ")
        case .choices(let choices): "a list of: " + choices.map { "`\($0.word)`" }.joined(separator: ", ")
        case .mapping(let place): "a mapping (\(place.noun))"
        case .list(let place): "a list; each item is \(place.noun)"
        case .answer: "an answer, see below"
        case .pages: "a list of page numbers, upwards"
        case .counter: "a number, or one per architecture"
        case .rules: "a list of rules (`I-5`, `X19`, `RV-2`) and `expect`"
        case .nothing: "nothing"
        }
    }
}
