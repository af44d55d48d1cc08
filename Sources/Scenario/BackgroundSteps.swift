import Frames
import Machine
import TextInput

/// The steps of the host's own tasks, and advices.
extension PhaseBuilder {
    /// Steps without a place in a region.
    static let backgroundWords = [
        "reclaim", "compact", "fail_allocation", "fail_swap", "merge_pages", "collapse_pages", "reap", "uffd_wait",
        "signal",
        "free_hugepages", "resv_hugepages",
    ]

    /// Nil: it was complained about.
    func backgroundAction(_ field: Field) -> Action? {
        switch (field.key.name, field.reading) {
        case ("reclaim", .number(let pages)): checkReclaims(field) ? .reclaim(pages: Int(pages)) : nil
        case ("compact", .number(let order)): checkReclaims(field) ? .compact(order: Int(order)) : nil
        case ("fail_allocation", .number(let count)): .failAllocation(count: Int(count))
        case ("fail_swap", _): failSwap(field, write: field.word(at: 0) == "write")
        case ("merge_pages", _): .mergePages
        case ("collapse_pages", _): .collapsePages
        case ("reap", _): .reap
        case ("uffd_wait", _): .userFaultWait
        case ("signal", _): signal(field.word(at: 0))
        case ("free_hugepages", .number(let bytes)): countHugePages(field, bytes, reserved: false)
        case ("resv_hugepages", .number(let bytes)): countHugePages(field, bytes, reserved: true)
        default: nil
        }
    }

    /// Alone it is a plain one.
    private func signal(_ word: String?) -> Action {
        let index = Vocabulary.signals.firstIndex { $0.word == word } ?? 0
        return .signal(SignalName.allCases[index])
    }

    private func countHugePages(_ field: Field, _ bytes: UInt64, reserved: Bool) -> Action? {
        guard let level = Vocabulary.hugeLevel(bytes) else {
            complaints.add(
                field.position, "there are no huge pages of \(Quantity.shown(bytes))", "2 MiB or 1 GiB")
            return nil
        }
        return .countHugePages(level, reserved: reserved)
    }

    func failFaults(_ region: Int, _ fields: Fields) -> Action {
        let index = Vocabulary.driverAnswers.firstIndex { $0.word == fields.words("answer").first } ?? 0
        return .failFault(
            region: region, answer: DriverAnswer.allCases[index], count: Int(fields.number("times") ?? 1))
    }

    func checkReclaims(_ field: Field) -> Bool {
        if reclaims { return true }
        complaints.add(
            field.keyPosition, "`\(field.key.name)` on a host that doesn't keep track of its pages",
            "add `reclaim: true` or `swap: 4 MiB` to `host`")
        return false
    }

    private func failSwap(_ field: Field, write: Bool) -> Action? {
        if swaps { return .failTransfer(region: nil, write: write) }
        complaints.add(field.keyPosition, "`fail_swap` on a host without a swap device", "add `swap: 4 MiB` to `host`")
        return nil
    }

    func advise(_ region: Int, _ offset: UInt64, _ length: UInt64, _ fields: Fields) -> Action {
        let index = Vocabulary.advices.firstIndex { $0.word == fields.words("advice").first } ?? 0
        guard index > 0 else { return .madviseDontNeed(region: region, offset: offset, length: length) }
        return .advise(region: region, offset: offset, length: length, AdviceName.allCases[index - 1])
    }

    /// The target must hold what is moved, and be page-aligned; Linux judges the rest.
    func moveMapping(_ region: Int, _ offset: UInt64, _ length: UInt64, _ fields: Fields) -> Action? {
        guard let place = fields.regionPlace("onto"),
            let target = layout.regionIndex(place.region, at: fields.position(of: "onto"), regions)
        else { return nil }
        let size = regions[target].size
        guard place.offset % pageSize == 0, place.offset <= size, length <= size - place.offset else {
            complaints.add(
                fields.position(of: "onto"), "\(Quantity.shown(length)) don't fit there",
                "a multiple of 4 KiB, with as much left to the end of `\(place.region)`")
            return nil
        }
        return .moveMapping(
            region: region, offset: offset, length: length, target: target, targetOffset: place.offset)
    }
}

extension Field {
    /// One of the words that are its value. Nil: it has no such word, or none at all.
    fileprivate func word(at index: Int) -> String? {
        guard case .words(let words) = reading, words.indices.contains(index) else { return nil }
        return words[index]
    }
}
