import Conformance
import Foundation
import IoctlScript
import LinuxKVM
import Replay
import TraceAudit

extension ConformKVM {
    /// `--trace`. Status 3 if nothing could be traced.
    func traceAll() async throws {
        let rules = try readExplanations(explanations)
        var (isFaithful, traced) = (true, 0)
        for path in scenarios {
            let subject = try TracedSubject(path)
            do {
                var comparison = try await trace(subject)
                comparison.explain(rules)
                traced += 1
                isFaithful = isFaithful && comparison.report.isFaithful
                output(comparison.text)
            } catch let error as PlayError {
                guard case .unplayable(let why) = error else { throw Failure(error, subject.name) }
                output("\(subject.name) can't be traced: \(why)\n")
            }
        }
        if !isFaithful { throw Failure(.findings) }
        if traced == 0 { throw Failure(.impossibleHere) }
    }

    private func trace(_ subject: TracedSubject) async throws -> TracedScript {
        var options = kernel.applied(to: RealRun.Options())
        options.hugePages = subject.usesHugePages
        do {
            return try await TracedScript(try subject.script(), name: subject.name, options, copying: copy)
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

/// A scenario, or a script: a file that ends in `.ioctl`.
private struct TracedSubject {
    let name: String
    let usesHugePages: Bool
    /// Throws `PlayError` where a scenario can't be one.
    let script: () throws -> Script

    init(_ path: String) throws(Failure) {
        if path.hasSuffix(".ioctl") {
            let read = try readScript(path)
            name = path
            usesHugePages = false
            script = { read }
            return
        }
        let plan = try load(path).plan
        name = String(decoding: plan.name, as: UTF8.self)
        usesHugePages = plan.transparentHugePages
        script = {
            do throws(PlanScript.Unplayable) { return try PlanScript(plan).script } catch {
                throw PlayError.unplayable(error)
            }
        }
    }
}
