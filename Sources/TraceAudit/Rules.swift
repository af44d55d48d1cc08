/// What is checked, in the order of the report. The id is the rule's name in the specification, or, where a rule there
/// has no number, a short name of its own; the raw value is only an index. Spec: x86 8, generic 8.
enum Rule: Int, CaseIterable, Sendable {
    case mmuPresent, writability, hostWritableKept, sameHostFrame, alignment, reservedBits, suppressedException,
        accessTracking, mmioGeneration, frozenFinal, shadowedReadOnly, unsyncLevel, staleInstall, guestAccess,
        dirtyLog, requestedInstalled, changeLegal, changeChain, prefetchGroup, prefetchAccessed, printedFlags,
        hostRanges

    /// The name in reports.
    var id: String {
        switch self {
        case .mmuPresent: "X18"
        case .writability: "X19"
        case .hostWritableKept: "X20"
        case .sameHostFrame: "X21"
        case .alignment: "X22"
        case .reservedBits: "X23"
        case .suppressedException: "X24"
        case .accessTracking: "X26"
        case .mmioGeneration: "X27"
        case .frozenFinal: "X28"
        case .shadowedReadOnly: "X48"
        case .unsyncLevel: "X49"
        case .staleInstall: "X12"
        case .guestAccess: "I-6"
        case .dirtyLog: "X43"
        case .requestedInstalled: "request"
        case .changeLegal: "change"
        case .changeChain: "chain"
        case .prefetchGroup: "prefetch"
        case .prefetchAccessed: "prefetch-A"
        case .printedFlags: "flags"
        case .hostRanges: "range"
        }
    }

    var statement: String {
        switch self {
        case .mmuPresent: "a shadow-present entry has bit 11; MMIO, frozen and empty entries do not"
        case .writability: "W needs MMU-writable, MMU-writable needs host-writable"
        case .hostWritableKept: "TDP: host-writable never goes 1 to 0 in a present leaf"
        case .sameHostFrame: "a present leaf keeps its pfn until it is zapped"
        case .alignment: "a huge leaf has bit 7, and gfn and pfn aligned to its size"
        case .reservedBits: "no reserved bit is set in a present entry"
        case .suppressedException: "EPT: every present entry has bit 63 (suppress #VE)"
        case .accessTracking: "EPT: an access-tracked entry has type 01, A clear and saved permissions"
        case .mmioGeneration: "an MMIO entry is valid exactly if its generation is the current one"
        case .frozenFinal: "TDP: a frozen entry is never overwritten"
        case .shadowedReadOnly: "a guest page table that is shadowed has no writable entry"
        case .unsyncLevel: "only level-1 shadow pages of guest tables are unsync"
        case .staleInstall: "nothing is installed from a lookup that an invalidation overtook"
        case .guestAccess: "a marked guest access that succeeded had an entry that allowed it"
        case .dirtyLog: "GET_DIRTY_LOG reports at least the pages that marked runs wrote"
        case .requestedInstalled: "the installed pfn is the requested one"
        case .changeLegal: "TDP: a non-present entry becomes another one only for MMIO or frozen"
        case .changeChain: "TDP: a change starts from the value that the last change left"
        case .prefetchGroup: "prefetched entries are 4K and in the fault's aligned group of eight"
        case .prefetchAccessed: "prefetched entries have A clear"
        case .printedFlags: "the printed permissions are those of the raw entry"
        case .hostRanges: "notifier ranges are page aligned and not empty"
        }
    }

    var source: String {
        switch self {
        case .requestedInstalled: "x86 3.4"
        case .changeLegal: "x86 3.3"
        case .changeChain: "x86 X36, 3.3"
        case .prefetchGroup: "x86 4.5, 12.4"
        case .prefetchAccessed: "x86 2.11, 12.4"
        case .printedFlags, .hostRanges: "x86 10"
        case .guestAccess: "generic I-6, x86 X11"
        case .staleInstall: "x86 X12, generic I-6"
        default: "x86 \(id)"
        }
    }

    /// Losing one event makes the rest of the recording unusable for these.
    var needsEveryEvent: Bool { self == .guestAccess || self == .dirtyLog || self == .changeChain }
}

/// Where in the recording something happened.
struct Moment {
    /// One-based.
    var line: UInt64
    /// Nanoseconds.
    var time: UInt64
    /// Index of the section, nil for the recording as a whole.
    var machine: Int?
}

/// A finding that only stands if the recording turns out to hold the events that would excuse it.
private struct Suspicion {
    enum Needs { case notifierEvents, emulationEvents }
    var needs: Needs
    var rule: Rule
    var finding: Finding
}

/// Counts checks, keeps findings, and knows what cannot be checked and why.
final class RuleBook {
    private var checks = [UInt64](repeating: 0, count: Rule.allCases.count)
    private var violations = [UInt64](repeating: 0, count: Rule.allCases.count)
    private var skips = [UInt64](repeating: 0, count: Rule.allCases.count)
    private var reasons = [String?](repeating: nil, count: Rule.allCases.count)
    private var kept = [Int](repeating: 0, count: Rule.allCases.count)
    private var suspicions: [Suspicion] = []
    private(set) var findings: [Finding] = []

    /// Counts a check that held.
    func held(_ rule: Rule) { checks[rule.rawValue] += 1 }

    /// Counts a check, and a finding if `condition` is false.
    func check(_ rule: Rule, _ condition: Bool, at moment: Moment, _ text: @autoclosure () -> String) {
        checks[rule.rawValue] += 1
        if !condition { violated(rule, at: moment, text()) }
    }

    private func violated(_ rule: Rule, at moment: Moment, _ text: String) {
        let index = rule.rawValue
        violations[index] += 1
        guard kept[index] < TraceAuditLimits.findingsPerRule else { return }
        kept[index] += 1
        findings.append(Finding(rule: rule, at: moment, text: text))
    }

    /// Counts a check that could not be done. The first reason is kept.
    func skip(_ rule: Rule, _ reason: @autoclosure () -> String) {
        let index = rule.rawValue
        skips[index] += 1
        if reasons[index] == nil { reasons[index] = reason() }
    }

    /// Keeps a finding until ``settle(hasNotifierEvents:hasEmulationEvents:)`` knows whether it stands.
    func suspect(
        _ rule: Rule, needsNotifierEvents: Bool, at moment: Moment, _ text: @autoclosure () -> String
    ) {
        checks[rule.rawValue] += 1
        guard suspicions.count < TraceAuditLimits.findingsPerRule * 4 else { return }
        suspicions.append(
            Suspicion(
                needs: needsNotifierEvents ? .notifierEvents : .emulationEvents, rule: rule,
                finding: Finding(rule: rule, at: moment, text: text())))
    }

    /// Turns suspicions into findings where the recording shows that the excusing events were recorded at all.
    func settle(hasNotifierEvents: Bool, hasEmulationEvents: Bool) {
        for suspicion in suspicions {
            let rule = suspicion.rule.rawValue
            switch suspicion.needs {
            case .notifierEvents where !hasNotifierEvents:
                checks[rule] -= 1
                skip(suspicion.rule, "the recording has no kvm_unmap_hva_range event that could have zapped it")
            case .emulationEvents where !hasEmulationEvents:
                checks[rule] -= 1
                skip(suspicion.rule, "the recording has no kvm_emulate_insn event: accesses may have been emulated")
            default:
                violations[rule] += 1
                guard kept[rule] < TraceAuditLimits.findingsPerRule else { continue }
                kept[rule] += 1
                findings.append(suspicion.finding)
            }
        }
        suspicions = []
        findings.sort { ($0.line, $0.rule, $0.text) < ($1.line, $1.rule, $1.text) }
    }

    func statuses() -> [RuleStatus] {
        Rule.allCases.map { rule in
            let index = rule.rawValue
            let verdict: RuleStatus.Verdict =
                violations[index] > 0 ? .violated : checks[index] > 0 ? .held : .notCheckable
            return RuleStatus(
                id: rule.id, statement: rule.statement, source: rule.source, verdict: verdict,
                checks: checks[index], violations: violations[index], notCheckable: skips[index],
                reason: reasons[index] ?? (checks[index] == 0 ? "the recording has no event that it applies to" : nil))
        }
    }
}

extension Finding {
    init(rule: Rule, at moment: Moment, text: String) {
        self.init(
            rule: rule.id, line: moment.line, time: Timestamp.text(moment.time), machine: moment.machine,
            text: text)
    }
}
