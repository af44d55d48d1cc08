import Explanations
import JSONOutput

/// A campaign as text and as JSON.
public struct CampaignReport {
    private let kernel: KernelDescription
    private let tally: Tally
    private let found: Campaign.Found?
    private let rules: [AnswerRule]

    public init(_ campaign: Campaign, _ tally: Tally, _ found: Campaign.Found?) {
        kernel = campaign.kernel
        self.tally = tally
        self.found = found
        rules = campaign.options.rules
    }

    /// Whether the two sides answered alike, but for what rules explain, of which there is little.
    public var isClean: Bool { found == nil && !explainsTooMuch(tally.explainedCount, of: tally.compared) }

    public var text: String {
        var lines = head + histogram + explained
        if let found {
            lines += [
                "",
                found.isRepeatable
                    ? "a difference in the script of seed \(found.seed); the fewest lines that show one:"
                    : "a difference in the script of seed \(found.seed), which did not come again:",
                found.text, found.script.source,
            ]
        } else if !isClean {
            lines.append("too much is explained: \(tally.explainedCount) of \(tally.compared) comparisons")
        } else {
            lines.append(
                "ok: \(tally.steps) steps in \(tally.scripts) scripts, seed \(tally.seed), Linux \(tally.kernel): no"
                    + (tally.explainedCount == 0 ? "" : " unexplained") + " difference")
        }
        return lines.joined(separator: "\n") + "\n"
    }

    private var head: [String] {
        let share = tally.steps == 0 ? 0 : 1000 * tally.touching / tally.steps
        let rate = tally.duration > 0 ? Int(Double(tally.steps) / tally.duration) : 0
        let guest =
            kernel.guest == .processor
            ? "run by the processor: its accesses go through stage-2 entries"
            : "run by KVM's emulator: no access goes through a stage-2 entry, and none is compared"
        let own = kernel.capabilities.table.filter { $0.device != 0 || $0.vm != 0 }.map {
            $0.device == $0.vm ? "\($0.name) \($0.device)" : "\($0.name) \($0.device) (of a VM \($0.vm))"
        }
        return [
            "Linux \(tally.kernel); the guest is \(guest)", "read from it: " + own.joined(separator: ", "),
            "measured: slots' addresses of \(kernel.features.slotAddressBits) bits, \(files)",
            "\(tally.steps) steps in \(tally.scripts) scripts, \(Int(tally.duration)) s, \(rate) a second;"
                + " \(share / 10).\(share % 10) % are guest accesses and changes to memory that a slot shows",
            "\(tally.compared) answers compared, \(tally.notCompared) not: one side could not do it, or the two had parted",
        ] + disturbed + [""]
    }

    private var disturbed: [String] {
        guard tally.disturbed > 0 else { return [] }
        return [
            "\(tally.disturbed) scripts ran again, and then without a difference: the kernel moved or took pages meanwhile"
        ]
    }

    private var files: String {
        let largest = kernel.features.largestFile
        return largest == Int64.max ? "files of any length" : "files of at most \(largest) bytes"
    }

    private var histogram: [String] {
        let width = tally.answers.keys.map(\.count).max() ?? 0
        return tally.answers.sorted { $0.key < $1.key }.map { call, answers in
            let sorted = answers.sorted { ($1.value, $0.key) < ($0.value, $1.key) }
            return call + String(repeating: " ", count: width - call.count + 2)
                + sorted.map { "\($0.key) \($0.value)" }.joined(separator: ", ")
        } + [""]
    }

    private var explained: [String] {
        rules.compactMap { rule in
            tally.explained[rule.name].map { "explained \($0) times: \(rule.name) (\(rule.kernelRule))" }
        }
    }

    public var json: String {
        struct Report: Encodable {
            var campaign: Tally
            var guest: String
            var capabilities: [String: Int64]
            var slotAddressBits: UInt64
            var largestFile: UInt64
            var difference: String?
            var script: String?
            var clean: Bool
        }
        return jsonText(
            Report(
                campaign: tally, guest: kernel.guest.rawValue,
                capabilities: Dictionary(uniqueKeysWithValues: kernel.capabilities.table.map { ($0.name, $0.device) }),
                slotAddressBits: kernel.features.slotAddressBits, largestFile: kernel.features.largestFile,
                difference: found?.text, script: found?.script.source, clean: isClean))
    }
}
