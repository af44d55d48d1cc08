import Frames
import Machine
import TextInput

// Reading a step's `expect`.

extension Answer {
    /// In the order of the reference page.
    static let allInOrder: [Answer] = [
        .ok, .value, .counting, .pages, .mmio, .dirtyRingFull, .memoryFault, .pageFault, .errno, .anyOf, .anything,
    ]

    var shown: String {
        switch self {
        case .ok: "`ok`"
        case .mmio: "`mmio`"
        case .dirtyRingFull: "`dirty_ring_full`"
        case .memoryFault: "`memory_fault`"
        case .pageFault: "`page_fault`"
        case .errno: "an error (`EFAULT`, ...)"
        case .value: "the value read (`0x1234`)"
        case .counting: "`{counting_from: 0x1000}`"
        case .pages: "`{pages: [0, 3]}`"
        case .anyOf: "`{any_of: [...]}`"
        case .anything: "`anything` (in a race)"
        }
    }
}

extension Vocabulary {
    /// The errors that KVM's and Linux's calls give here, by name.
    static let errors: [Errno] = [
        .EPERM, .ENOENT, .EINTR, .EIO, .ENXIO, .EBADF, .EAGAIN, .ENOMEM, .EACCES, .EFAULT, .EBUSY, .EEXIST, .ENODEV,
        .E2BIG, .EINVAL, .EFBIG, .ENOSPC, .EOVERFLOW, .EOPNOTSUPP, .EREMOTEIO, .EHWPOISON,
    ]

    static func errno(_ name: String) -> Errno? { errors.first { "\($0)" == name } }
}

extension ShapeReader {
    /// An answer, or a mapping of architectures to answers.
    func answer(_ element: Element, _ allowed: [Answer]) -> AnswerReading? {
        guard case .mapping(let entries) = element.content, let first = entries.first,
            first.key == "otherwise" || Vocabulary.architectureSet(first.key) != nil
        else {
            return plainAnswer(element, allowed).map { AnswerReading(expectation: $0) }
        }
        var answers: [(word: String, expectation: StepExpectation)] = []
        for entry in entries {
            guard entry.key == "otherwise" || Vocabulary.architectureSet(entry.key) != nil else {
                complaints.add(
                    entry.keyPosition, "`\(entry.key)` is not an architecture",
                    "expected one of: \((Vocabulary.architectureWords + ["otherwise"]).joined(separator: ", "))")
                return nil
            }
            guard let answer = plainAnswer(entry.value, allowed) else { return nil }
            answers.append((entry.key, answer))
        }
        return perArchitecture(answers, at: element.position)
    }

    /// The more exact name goes first: `riscv-sv39x4` before `riscv` before `otherwise`. Where nothing else is said,
    /// `x86-tdp` answers for the other MMUs of x86 too.
    private func perArchitecture(
        _ answers: [(word: String, expectation: StepExpectation)], at position: Position
    ) -> AnswerReading? {
        var exceptions: [ArchitectureExpectation] = []
        for (choice, architecture) in zip(Vocabulary.architectures, Architecture.allCases) {
            let family = ArchitectureSet.riscv.contains(architecture) ? "riscv" : "x86"
            // Who knows of one MMU of x86 only means it for all.
            let words = [choice.word, family, "otherwise"] + (family == "x86" ? ["x86-tdp"] : [])
            guard let answer = words.lazy.compactMap({ word in answers.first { $0.word == word } }).first else {
                complaints.add(
                    position, "`expect` says nothing about `\(choice.word)`", "add `\(choice.word)` or `otherwise`")
                return nil
            }
            let set = ArchitectureSet(architecture)
            if let same = exceptions.firstIndex(where: { $0.expectation == answer.expectation }) {
                exceptions[same].architectures.formUnion(set)
            } else {
                exceptions.append(ArchitectureExpectation(set, answer.expectation))
            }
        }
        // The first architecture's answer is the rule, the others are exceptions.
        return AnswerReading(expectation: exceptions[0].expectation, exceptions: Array(exceptions.dropFirst()))
    }

    private func plainAnswer(_ element: Element, _ allowed: [Answer]) -> StepExpectation? {
        let before = complaints.count
        let answer: (Answer, StepExpectation)? =
            switch element.content {
            case .scalar(let text, _): scalarAnswer(text)
            case .mapping(let entries): mappingAnswer(entries, allowed)
            default: nil
            }
        guard let (kind, expectation) = answer, allowed.contains(kind) else {
            // What is wrong inside a mapping has been told already.
            guard complaints.count == before else { return nil }
            let list = Answer.allInOrder.filter(allowed.contains).map(\.shown).joined(separator: ", ")
            complaints.add(
                element.position, "`expect` can't be \(element.kind) here", "expected \(list), or one per architecture")
            return nil
        }
        return expectation
    }

    private func scalarAnswer(_ text: String) -> (Answer, StepExpectation)? {
        switch text {
        case "ok": return (.ok, .success)
        case "mmio": return (.mmio, .mmio)
        case "dirty_ring_full": return (.dirtyRingFull, .dirtyRingFull)
        case "memory_fault": return (.memoryFault, .memoryFault)
        case "page_fault": return (.pageFault, .pageFault)
        case "anything": return (.anything, .anything)
        default:
            if let errno = Vocabulary.errno(text) { return (.errno, .error(errno)) }
            return Quantity.number(text).map { (.value, .value($0)) }
        }
    }

    private func mappingAnswer(_ entries: [Element.Entry], _ allowed: [Answer]) -> (Answer, StepExpectation)? {
        guard let entry = entries.first, entries.count == 1 else { return nil }
        switch (entry.key, entry.value.content) {
        case ("any_of", .list(let elements)):
            return alternatives(elements, at: entry.value.position, allowed).map { (.anyOf, .oneOf($0)) }
        case ("pages", _): return pages(entry.value).map { (.pages, .pages($0)) }
        case ("counting_from", .scalar(let text, _)):
            return Quantity.number(text).map { (.counting, .counting(from: $0)) }
        default: return nil
        }
    }

    /// The elements of `any_of`: different answers that the step may give, no lists among them.
    private func alternatives(
        _ elements: [Element], at position: Position, _ allowed: [Answer]
    ) -> [StepExpectation]? {
        let single = allowed.filter { $0 != .anyOf && $0 != .anything }
        var found: [StepExpectation] = []
        for element in elements {
            guard let answer = plainAnswer(element, single) else { return nil }
            if found.contains(answer) {
                complaints.add(element.position, "`any_of` has this answer already", "leave it out")
                return nil
            }
            found.append(answer)
        }
        guard found.count > 1 else {
            complaints.add(position, "`any_of` needs two answers at least", "write the answer itself after `expect:`")
            return nil
        }
        return found
    }
}
