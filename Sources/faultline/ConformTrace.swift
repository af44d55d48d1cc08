import Conformance
import Foundation
import IoctlScript
import LinuxKVM
import Replay
import Synchronization
import TraceAudit

extension ConformKVM {
    /// `--trace`. Status 3 if nothing could be traced.
    func traceAll() throws {
        let rules = try readExplanations(explanations)
        var (isFaithful, traced) = (true, 0)
        // Making an instance of tracefs takes a second: one for all, and one for those with huge pages.
        var runs: [Bool: TracedRun] = [:]
        for path in scenarios {
            let subject = try TracedSubject(path)
            do {
                let script = try subject.script()
                let run = try runs[subject.usesHugePages] ?? start(rules, hugePages: subject.usesHugePages)
                runs[subject.usesHugePages] = run
                let comparison = try run.compare(script, name: subject.name, copying: copy)
                traced += 1
                isFaithful = isFaithful && comparison.report.isFaithful
                output(comparison.text)
            } catch let error as AuditInputError {
                throw Failure(.unusable, "error: the recording can't be read: \(error)")
            } catch let error as PlayError {
                guard case .unplayable(let why) = error else { throw Failure(error, subject.name) }
                output("\(subject.name) can't be traced: \(why)\n")
            }
        }
        if !isFaithful { throw Failure(.findings) }
        if traced == 0 { throw Failure(.impossibleHere) }
    }

    private func start(_ rules: [Explanation], hugePages: Bool = false) throws(Failure) -> TracedRun {
        var options = kernel.applied(to: RealRun.Options())
        options.hugePages = hugePages
        do throws(RealRun.Unavailable) { return try TracedRun(options, rules: rules) } catch {
            throw Failure(.impossibleHere, "error: \(error.reason)")
        }
    }

    /// Random scripts.
    func traceRandom() throws {
        stopAtInterrupt()
        let (steps, first) = (steps ?? 2000, seed ?? 1)
        let run = try start(try readExplanations(explanations))
        var (done, compared) = (0, 0)
        let found: TracedRun.Found?
        do {
            found = try run.compareRandom(seed: first, steps: steps) {
                (done, compared) = ($0, $1)
                return !isInterrupted.load(ordering: .relaxed)
            }
        } catch let error as AuditInputError {
            throw Failure(.unusable, "error: the recording can't be read: \(error)")
        } catch let error as PlayError {
            throw Failure(error, "a random script")
        }
        guard let found else {
            output("ok: \(done) steps from seed \(first), \(compared) comparisons, no difference\n")
            return
        }
        output(found.comparison.text + "\n" + found.script.source)
        throw Failure(.findings)
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
