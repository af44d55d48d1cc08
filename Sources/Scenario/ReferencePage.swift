import Machine
import TextInput

/// The reference page of the scenario language, in Markdown, made from the vocabulary.
public func referencePage() -> String {
    (introduction + PageWriter.situation + PageWriter.steps + [PageWriter.answers] + PageWriter.rest)
        .joined(separator: "\n\n") + "\n"
}

private let introduction = [
    "# Scenario reference",
    "<!-- Generated from Sources/Scenario/Vocabulary*.swift by `faultline schema --reference`; a test compares. -->",
    """
    A scenario is a YAML file that describes one guest-memory situation. The comment at its top tells the story; \
    reports print it. Each key is listed here once, with what its value may be. Editors that know JSON Schema check a \
    file as it is typed if it has the line `# yaml-language-server: $schema=scenario.schema.json`.
    """,
    """
    Numbers are decimal or hexadecimal, with `_` between digits where it helps: `4096`, `0x1000_0000`. Sizes may have \
    a unit: `64 KiB`, `2 MiB`, `1 GiB`. A place in a region is its name, perhaps with an offset: `ram`, `ram+0x1000`, \
    `ram+2 MiB`. Where a guest address is asked for, such a place stands for the address at which a slot shows it to \
    the guest.
    """,
    """
    The file is UTF-8 with Unix line ends, at most \(Quantity.shown(UInt64(SourceText.largest))), nested at most \
    \(PlainYAML.deepest) deep, one document. Anchors, aliases, merge keys, tags, block scalars and tabs are refused: \
    what a scenario says stands where it is used.
    """,
]

private enum PageWriter {
    static let situation: [String] = [
        "## The scenario", table(.scenario),
        "## `host`", table(.host),
        "### A region", table(.region),
        "Kinds of regions:", choices(Vocabulary.regionKinds),
        "## `vm`", table(.vm),
        "### A slot", "The names are those of `struct kvm_userspace_memory_region`.", table(.slot),
        "Flags:", choices(Vocabulary.slotFlags),
        "Architectures:",
        choices(Vocabulary.architectures) + "\n\n`x86` and `riscv` name both of theirs in an `expect`.",
        "## `phases`",
        "Phases follow one another. The tasks inside a phase run side by side: `run` takes them in the order written, "
            + "the explorer in every order.",
        table(.phase),
    ]

    static let steps: [String] = [
        "## Steps",
        "A step is one action with its parameters: `- write: ram+0x1000` and, below it, `value: 7`. An action without a "
            + "value may stand alone: `- fork`.",
        "### Steps of a vCPU", actions(.guestStep),
        "Parameters:", table(.guestStep),
        "### Steps of the host", actions(.hostStep),
        "Parameters:", table(.hostStep),
    ]

    static var answers: String {
        var lines = [
            "## What a step must give",
            "",
            "Without `expect` a step must work. `expect` is one of:",
            "",
            "| answer | means |",
            "|---|---|",
            "| `ok` | it works; a value read is not looked at |",
            "| `0x1234` | every value read is this |",
        ]
        for key in Vocabulary.keys(of: .answer) {
            lines.append("| `{\(key.name): \(key.example)}` | \(escaped(key.meaning)) |")
        }
        lines.append("| `mmio` | the guest's access leaves for MMIO emulation (KVM_EXIT_MMIO) |")
        lines.append(
            "| `dirty_ring_full` | the vCPU is not entered: its dirty ring must be reset first (KVM_EXIT_DIRTY_RING_FULL) |"
        )
        lines.append(
            "| `memory_fault` | KVM_RUN fails with EFAULT and names the page (KVM_EXIT_MEMORY_FAULT): it is private, or "
                + "shared, and was wanted the other way |")
        lines.append("| `page_fault` | the guest's own page tables forbid it, or map nothing there: its page fault |")
        lines.append("| `anything` | whatever comes of it: for a step that races with another task's |")
        let errors = Vocabulary.errors.map { "`\($0)`" }.joined(separator: ", ")
        lines.append("| \(errors) | the call, or KVM_RUN, fails with this error |")
        return lines.joined(separator: "\n")
    }

    static let rest: [String] = [
        "Where architectures differ, `expect` names them: `expect: {x86-tdp: mmio, riscv: EFAULT}`. The more exact name "
            + "goes first, and every architecture must have an answer; `x86-tdp` answers for the other MMUs of x86 where nothing else does.",
        "## `expect` of the whole run", table(.outcome),
        "Counters; where architectures differ, `{x86-tdp: 1, riscv: 0}`, and a counter is looked at only where one is "
            + "named:",
        table(.statistics),
        "## `known`",
        "The older policies break rules; that is what they are there to show. `precise` has no entry: `expect` describes "
            + "it. `expect` in a list means that some expectation of the scenario isn't met.",
        table(.known),
    ]

    /// The keys of a place that are no actions.
    private static func table(_ place: Place) -> String {
        let keys = Vocabulary.keys(of: place).filter { $0.step == nil }
        let rows = keys.map { key in
            let otherwise = if case .optional(let text) = key.necessity { text } else { "required" }
            let name = key.numbered ? "\(key.name)0`, `\(key.name)1`, ..." : "\(key.name)`"
            return "| `\(name) | \(escaped(key.type.expected)) | \(otherwise) | \(escaped(key.meaning)) "
                + "| `\(escaped("\(key.shownName): \(key.example)"))` |"
        }
        return (["| key | value | default | meaning | example |", "|---|---|---|---|---|"] + rows)
            .joined(separator: "\n")
    }

    private static func actions(_ place: Place) -> String {
        let rows = Vocabulary.actions(of: place).map { key in
            let shape = key.step ?? StepShape()
            let parameters = shape.parameters.map { "`\($0)`" }.joined(separator: ", ")
            let kinds =
                shape.kinds == RegionKind.allCases
                ? "" : "; on " + shape.kinds.map { "`\(Vocabulary.word($0))`" }.joined(separator: ", ")
            let answers = Answer.allInOrder.filter(shape.answers.contains).map(\.shown).joined(separator: ", ")
            return "| `\(key.name)` | \(escaped(key.type.expected)) | \(escaped(key.meaning))\(kinds) | \(parameters) "
                + "| \(answers) | `- \(escaped(key.example))` |"
        }
        return
            (["| action | value | what happens | parameters | answers | example |", "|---|---|---|---|---|---|"] + rows)
            .joined(separator: "\n")
    }

    private static func choices(_ choices: [Choice]) -> String {
        let rows = choices.map { "| `\($0.word)` | \(escaped($0.meaning)) |" }
        return (["| word | means |", "|---|---|"] + rows).joined(separator: "\n")
    }

    /// A bar would end the table's cell.
    private static func escaped(_ text: String) -> String {
        text.split(separator: "|", omittingEmptySubsequences: false).joined(separator: "\\|")
    }
}
