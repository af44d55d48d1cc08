import Explanations
import Interface
import IoctlScript
import JSONOutput
import LinuxKVM
import TextInput

/// What is said of KVM, as a script that shows it.
public struct Claim: Sendable {
    public var text: String
    /// Who says so.
    public var source: String
    /// How kernels before 6.13 differ; nil: they don't, or nobody knows.
    public var older: String?
    public var script: Script
    /// What answers must be, by the line's place in the script: patterns in which `*` stands for anything.
    public var expected: [Int: String]

    /// Claims/claims.ioctl, which is part of the program.
    public static func known() throws(InputErrors) -> [Claim] {
        try list(String(decoding: PackageResources.claims_ioctl, as: UTF8.self), file: "claims.ioctl")
    }

    /// The claims of a file: each begins with a line `## CLAIM`, has lines `# source: WHO` and perhaps `# before 6.13: HOW`,
    /// and a script whose lines may end with `# => ANSWER`. Line numbers of errors are the section's.
    public static func list(_ text: String, file: String) throws(InputErrors) -> [Claim] {
        var claims: [Claim] = []
        for section in "\n\(text)".split(separator: "\n## ", omittingEmptySubsequences: false).dropFirst() {
            claims.append(try Claim(String(section), file))
        }
        return claims
    }

    private init(_ section: String, _ file: String) throws(InputErrors) {
        let lines = section.split(separator: "\n", omittingEmptySubsequences: false).map(String.init)
        text = lines[0]
        func value(_ key: String) -> String? {
            lines.first { $0.hasPrefix("# \(key): ") }.map { String($0.dropFirst(key.count + 4)) }
        }
        source = value("source") ?? "nobody"
        older = value("before 6.13")
        // The language's name takes the place of the claim, so that lines keep their numbers.
        let body = ["# faultline ioctl 1"] + lines.dropFirst()
        script = try Script(text: body.joined(separator: "\n"), file: "\(file), \(text)")
        expected = [:]
        for (index, line) in script.lines.enumerated() {
            guard let mark = body[line.number - 1].firstRange(of: "# => ") else { continue }
            let answer = body[line.number - 1][mark.upperBound...]
            expected[index] = String(answer)
        }
    }

    /// Where answers are not as claimed: the line, what was claimed, the answer. Of a run that ended early what is missing
    /// is told too.
    func failures(_ answers: [Answer]) -> [ClaimTable.Failure] {
        expected.sorted { $0.key < $1.key }.compactMap { index, pattern in
            let answer = index < answers.count ? "\(answers[index])" : "none"
            guard !fits(pattern, answer) else { return nil }
            return .init(line: script.source(of: script.lines[index]), claimed: pattern, answer: answer)
        }
    }
}

/// Each claim on the model and on the kernel.
public struct ClaimTable: Sendable {
    public struct Failure: Sendable, Equatable, Encodable {
        public var line: String
        public var claimed: String
        public var answer: String
    }
    public struct Row: Sendable {
        public var claim: Claim
        public var model: [Failure]
        public var kernel: [Failure]
        /// The kernel's side could not do it; why.
        public var notHere: String?
    }
    public let rows: [Row]
    public let kernel: String

    /// Tries every claim on both sides.
    public init(_ claims: [Claim], on run: RealRun) throws(RealRun.Unavailable) {
        let description = try KernelDescription(run)
        guard let storage = ModelStorage() else { throw RealRun.Unavailable(reason: "no room for the model's memory") }
        kernel = description.release
        var rows: [Row] = []
        for claim in claims {
            var (real, ending): ([Answer], String?) = ([], nil)
            do throws(RealRun.Failure) { real = try run.answers(of: claim.script) } catch {
                switch error {
                case .unavailable(let unavailable): throw unavailable
                case .finding(let finding): (real, ending) = (finding.answers, finding.reason)
                }
            }
            var executor = ModelExecutor(storage, features: description.features)
            let model = claim.script.run(on: &executor)
            executor.finish()
            var row = Row(claim: claim, model: claim.failures(model), kernel: claim.failures(real))
            for finding in executor.findings {
                row.model.append(.init(line: "the end", claimed: "no rule broken", answer: "\(finding.reason.text)"))
            }
            if let ending { row.kernel.append(.init(line: "the end", claimed: "an answer", answer: ending)) }
            row.notHere = real.first { $0.isNotHere }.map { "\($0)" }
            rows.append(row)
        }
        self.rows = rows
    }

    /// Whether kernels like this one have the series. Its first release is 6.13.
    var hasSeries: Bool {
        let parts = kernel.split(separator: ".").prefix(2).compactMap { Int($0.prefix { $0.isNumber }) }
        return parts.count == 2 && (parts[0], parts[1]) >= (6, 13)
    }

    /// Whether every claim holds on both sides, where it could be tried; on an older kernel, but for what is explained.
    public var isClean: Bool {
        rows.allSatisfy { row in
            row.model.isEmpty && (row.kernel.isEmpty || row.notHere != nil || (!hasSeries && row.claim.older != nil))
        }
    }

    public var text: String {
        var text = "model  kernel    Linux \(kernel)\n"
        for row in rows {
            let kernel = row.notHere != nil ? "not here" : row.kernel.isEmpty ? "yes" : "NO"
            text += (row.model.isEmpty ? "yes" : "NO").padded(7) + kernel.padded(10) + row.claim.text + "\n"
            text += "                 (\(row.claim.source))\n"
            if let reason = row.notHere { text += "                 \(reason)\n" }
            for (side, failures) in [("model", row.model), ("kernel", row.notHere == nil ? row.kernel : [])] {
                for failure in failures {
                    text += "                 \(side): \(failure.line)\n"
                    text += "                     claimed \(failure.claimed), is \(failure.answer)\n"
                }
            }
            if !hasSeries, !row.kernel.isEmpty, let older = row.claim.older {
                text += "                 before 6.13: \(older)\n"
            }
        }
        return text
    }

    public var json: String {
        struct Line: Encodable {
            var claim: String
            var source: String
            var model: [Failure]
            var kernel: [Failure]
            var notHere: String?
        }
        struct Table: Encodable {
            var kernel: String
            var claims: [Line]
            var clean: Bool
        }
        return jsonText(
            Table(
                kernel: kernel,
                claims: rows.map {
                    Line(
                        claim: $0.claim.text, source: $0.claim.source, model: $0.model, kernel: $0.kernel,
                        notHere: $0.notHere)
                }, clean: isClean))
    }
}

extension String {
    fileprivate func padded(_ width: Int) -> String { self + String(repeating: " ", count: max(0, width - count)) }
}
