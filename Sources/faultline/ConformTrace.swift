import Conformance
import Foundation
import LinuxKVM
import Machine
import Replay
import TraceAudit

extension ConformKVM {
    /// `--trace`. Status 3 if no scenario could be traced.
    func traceAll() async throws {
        let rules = try readExplanations(explanations)
        var (isFaithful, traced) = (true, 0)
        for path in scenarios {
            let plan = try load(path).plan
            do {
                var scenario = try await trace(plan)
                scenario.explain(rules)
                traced += 1
                isFaithful = isFaithful && scenario.report.isFaithful
                output(scenario.text)
            } catch let error as PlayError {
                guard case .unplayable(let why) = error else { throw Failure(error, plan) }
                output("\(String(decoding: plan.name, as: UTF8.self)) can't be traced: \(why)\n")
            }
        }
        if !isFaithful { throw Failure(.findings) }
        if traced == 0 { throw Failure(.impossibleHere) }
    }

    private func trace(_ plan: Plan) async throws -> TracedScenario {
        var options = kernel.applied(to: RealRun.Options())
        options.hugePages = plan.transparentHugePages
        do {
            return try await TracedScenario(plan, options, copying: copy)
        } catch let error as AuditInputError {
            throw Failure(.unusable, "error: the recording can't be read: \(error)")
        }
    }

    /// A file of tracefs says that it is empty: it is read to its end.
    private func copy(_ recording: String) throws {
        guard let keep else { return }
        do {
            let text = try FileHandle(forReadingFrom: URL(fileURLWithPath: recording)).readToEnd() ?? Data()
            try text.write(to: URL(fileURLWithPath: keep))
        } catch {
            throw Failure(.unusable, "error: \(keep) can't be written: \((error as NSError).localizedDescription)")
        }
    }
}
