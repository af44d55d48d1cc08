import Foundation
import IoctlScript
import Testing

@testable import LinuxKVM

/// A kernel that does not return from a call, or ends the process that makes it, is told with the call; nothing is left.
@Suite(.needsKVM) struct Findings {
    private static let slow = "guest write cpu=0 gpa=0 count=1048576 stride=0 value=1 by=emulator"

    private func slowScript() throws -> Script {
        try Script(
            "host name=r kind=anonymous size=64k", "vm", "vcpu", "region slot=0 gpa=0 size=64k hva=r",
            "load host=r count=1048576 stride=0", Self.slow, "get_dirty_log slot=0")
    }

    private func finding(_ options: RealRun.Options) throws -> (RealRun, RealRun.Finding?) {
        let run = try RealRun(options)
        do throws(RealRun.Failure) {
            _ = try run.answers(of: try! slowScript())
            return (run, nil)
        } catch {
            guard case .finding(let finding) = error else { return (run, nil) }
            return (run, finding)
        }
    }

    @Test func `a call that takes too long is told, and the next script is answered`() throws {
        var options = RealRun.Options()
        options.deadline = 150
        let (run, found) = try finding(options)
        let finding = try #require(found)
        #expect(finding.index == 5 && finding.answers[3] == .done)
        #expect(finding.reason == "the call did not return within 150 ms, and its process was ended")
        let processes = try #require(run.processes)
        #expect(Process.children(processes.child).isEmpty)
        #expect(try run.answers(of: try Script("vm", "vcpu")) == [.done, .done])
    }

    @Test func `a script has so much time of a processor`() throws {
        var options = RealRun.Options()
        options.processorSeconds = 1
        options.deadline = 60_000
        let (_, found) = try finding(options)
        let finding = try #require(found)
        #expect(finding.index == 5)
        #expect(finding.reason.hasPrefix("the process that made the call was ended by SIG"))
    }

    @Test func `a process that is killed is told`() throws {
        let run = try RealRun()
        #expect(run.perform(.createVM(vm: 0, type: 0), process: 0) == .done)
        let worker = try #require(run.processes).worker
        kill(worker, SIGKILL)
        let answer = run.perform(.createVM(vm: 1, type: 0), process: 0)
        #expect(answer == Answer(.notHere("the process that made the call was ended by SIGKILL")))
        // A new one begins.
        #expect(run.perform(.close(.vm(0)), process: 0) == Answer(.failed(9)))
    }

    @Test func `a process of a process line that is killed is told`() throws {
        let run = try RealRun()
        #expect(run.perform(.createVM(vm: 0, type: 0), process: 0) == .done)
        #expect(run.perform(.fork(process: 1), process: 0) == .done)
        let worker = try #require(run.processes).worker
        let child = try #require(Process.children(worker).first)
        kill(child, SIGKILL)
        let answer = run.perform(.createVM(vm: 1, type: 0), process: 1)
        #expect(answer == Answer(.notHere("the process that made the call has ended")))
    }

    @Test func `a process that is stopped is told and ended`() throws {
        var options = RealRun.Options()
        options.deadline = 200
        let run = try RealRun(options)
        #expect(run.perform(.createVM(vm: 0, type: 0), process: 0) == .done)
        let worker = try #require(run.processes).worker
        kill(worker, SIGSTOP)
        let answer = run.perform(.createVM(vm: 1, type: 0), process: 0)
        #expect(answer.description.hasPrefix("not here: the call did not return within 200 ms"))
        #expect(!Process.exists(worker))
    }

    @Test func `a child that is killed takes its processes with it, and another is started`() throws {
        let run = try RealRun()
        #expect(run.perform(.createVM(vm: 0, type: 0), process: 0) == .done)
        #expect(run.perform(.fork(process: 1), process: 0) == .done)
        let (child, worker) = try #require(run.processes)
        let forked = try #require(Process.children(worker).first)
        kill(child, SIGKILL)
        // The worker goes with it, the other one within two seconds.
        for _ in 0..<100 where Process.exists(worker) { usleep(50_000) }
        let answer = run.perform(.createVM(vm: 1, type: 0), process: 0)
        #expect(answer == Answer(.notHere("the child process has ended")))
        #expect(run.perform(.createVM(vm: 0, type: 0), process: 0) == .done)
        for _ in 0..<40 where Process.exists(worker) || Process.exists(forked) { usleep(100_000) }
        #expect(!Process.exists(worker) && !Process.exists(forked))
    }
}
