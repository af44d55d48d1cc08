import CKVMInterface
import Foundation
import IoctlScript
import Testing

@testable import LinuxKVM

/// Any system call can be made to fail: the errno reaches the answer, and nothing is left open, mapped or running.
@Suite(.needsKVM, .serialized) struct ForcedErrors {
    /// Every call of KVM that a script has, and the ends of what they make.
    private static func script() throws -> Script {
        try Script(
            "host name=r kind=anonymous size=256k", "host name=f kind=file size=64k", "host name=m kind=memfd size=64k",
            "mmap host=m length=4k source=f", "madvise host=r length=4k advice=dontneed", "vm",
            "enable_cap cap=dirty_log_ring args=64k", "check_extension cap=user_memory", "vcpu id=0",
            "region slot=0 flags=log_dirty gpa=0x10000 size=64k hva=r", "guest write cpu=0 gpa=0x10000 count=3 value=5",
            "guest read cpu=0 gpa=0x10000 count=3", "guest exec cpu=0 gpa=0x10000", "ring_collect cpu=0", "ring_reset",
            "stats names=pages_4k", "stats cpu=0 names=exits", "enable_cap cap=dirty_log_ring_with_bitmap",
            "prefault cpu=0 gpa=0x10000 size=4k", "vm name=plain",
            "region vm=plain slot=0 flags=log_dirty gpa=0 size=64k hva=r",
            "get_dirty_log vm=plain slot=0", "clear_dirty_log vm=plain slot=0 first=0 count=16 bits=all",
            "memfd vm=plain name=g size=64k", "allocate memfd=g offset=0 length=4k",
            "attributes vm=plain gpa=0 size=4k attributes=none", "process name=p", "vm name=v2 as=p",
            "vcpu vm=v2 as=p", "guest read vm=v2 cpu=0 gpa=0 as=p", "munmap host=r length=64k",
            // Memory of the process's own is not KVM's: its end is the process's.
            "close vm=v2 cpu=0", "close vm=v2", "close vm=vm cpu=0", "close vm=vm", "close vm=plain", "close memfd=g",
            "exit as=p")
    }

    /// Of section 4 of the specification, and what others a call may give.
    private static let errnos: [Int32] = [1, 2, 4, 5, 6, 7, 9, 11, 12, 14, 16, 17, 19, 22, 25, 28, 75, 95, 133]

    @Test(arguments: [
        "region slot=0 gpa=0x10000 size=64k hva=r", "region2 slot=0 gpa=0x10000 size=64k hva=r",
        "get_dirty_log slot=0", "clear_dirty_log slot=0 first=0 count=16 bits=all",
        "enable_cap cap=manual_dirty_log_protect2 args=1", "check_extension cap=user_memory",
        "vm name=other", "vcpu id=7", "memfd name=g size=64k",
        "attributes gpa=0 size=4k attributes=none", "prefault cpu=0 gpa=0 size=4k", "ring_reset",
        "no_argument call=region", "stats names=pages_4k", "munmap host=r length=4k",
        "mprotect host=r length=4k prot=r",
        "mmap host=r length=4k", "madvise host=r length=4k advice=cold", "close vm=vm",
        "mremap host=r length=4k new_length=4k to=r+64k", "process name=p",
    ])
    func `the errno of a call reaches its answer unchanged`(call: String) throws {
        let run = try RealRun()
        let script = try Script("host name=r kind=anonymous size=256k", "vm", "vcpu id=0", call)
        _ = try run.answers(of: script)
        let before = run.callsBefore(line: 3)
        for errno in Self.errnos {
            let answers = try run.answers(of: script, forcing: .init(call: before + 1, errno: errno))
            #expect(answers[3] == Answer(.failed(errno)))
            #expect(answers[..<3].allSatisfy { $0 == .done })
        }
    }

    @Test func `the errno of KVM_RUN reaches the answer with what the guest has done`() throws {
        let run = try RealRun()
        let script = try Script(
            "host name=r kind=anonymous size=64k", "vm", "vcpu", "region slot=0 gpa=0 size=64k hva=r",
            "guest write cpu=0 gpa=0 count=4 value=1", "guest write cpu=0 gpa=0 count=4 value=1", "vm name=end")
        _ = try run.answers(of: script)
        // Registers, KVM_RUN, what is pending, registers.
        let before = run.callsBefore(line: 5)
        #expect(run.callsBefore(line: 6) == before + 4)
        for errno in Self.errnos {
            let answer = try run.answers(of: script, forcing: .init(call: before + 2, errno: errno))[5]
            #expect(answer.outcome == .failed(errno))
            // These two say that the guest never began.
            #expect(answer.fields == (errno == 5 || errno == 9 ? [] : [.init("done", .decimal(0))]))
        }
        let setUp = try run.answers(of: script, forcing: .init(call: before + 1, errno: 12))[5]
        #expect(setUp == Answer(.notHere("no guest can be set up: ENOMEM")))
    }

    /// In a process of its own, whose descriptors and mappings no other test changes.
    @Test func `whatever call fails, the script goes on and leaves nothing`() async {
        await #expect(processExitsWith: .success) { try Self.failEachCall() }
    }

    private static func failEachCall() throws {
        let run = try RealRun()
        let script = try script()
        let own = getpid()
        let undisturbed = try run.answers(of: script)
        let calls = run.callsMade
        run.finish()
        let (child, _) = try #require(run.processes)
        let (ownDescriptors, ownMappings) = (Process.descriptors(own).count, Process.mappings(own).count)
        let (descriptors, mappings) = (Process.descriptors(child).sorted(), Process.mappings(child))
        let closes = undisturbed.count - 7
        for call in 1...calls {
            let answers = try run.answers(of: script, forcing: .init(call: call, errno: 12))
            #expect(answers.count == undisturbed.count)
            // Not the call that should have closed it.
            if run.callsBefore(line: closes) >= call {
                let (_, worker) = try #require(run.processes)
                #expect(!Process.descriptors(worker).contains { $0.contains("kvm-") }, "call \(call)")
                #expect(!Process.mappings(worker).contains { $0.contains("kvm-") }, "call \(call)")
            }
            run.finish()
            #expect(Process.children(child).isEmpty, "call \(call)")
        }
        #expect(Process.descriptors(child).sorted() == descriptors)
        #expect(Process.mappings(child) == mappings)
        #expect(Process.descriptors(own).count == ownDescriptors)
        #expect(abs(Process.mappings(own).count - ownMappings) < 16)
        // But for statistics, whose numbers are no two times the same.
        let again = try run.answers(of: script)
        #expect(again.map(\.outcome) == undisturbed.map(\.outcome))
    }

    private static func start(_ change: (inout RealRun.Options) -> Void) throws -> RealRun.Unavailable? {
        var options = RealRun.Options()
        change(&options)
        do throws(RealRun.Unavailable) {
            let run = try RealRun(options)
            // Only the start is asked about: what a script then comes to, no test here says.
            _ = try? run.answers(of: try Script("vm"))
            return nil
        } catch {
            return error
        }
    }

    @Test func `a start that fails is told and leaves nothing`() async {
        await #expect(processExitsWith: .success) { try Self.failEachStart() }
    }

    private static func failEachStart() throws {
        let own = getpid()
        func sockets() -> Int { Process.descriptors(own).filter { $0.hasPrefix("socket:") }.count }
        func shared() -> Int { Process.mappings(own).filter { $0.contains("/dev/zero") }.count }
        let (socketsBefore, sharedBefore) = (sockets(), shared())
        let children = Set(Process.children(own))
        // Shared memory, a socket, a process.
        for call in 1...3 {
            let failed = try start { $0.start = .init(call: UInt64(call), errno: 12) }
            #expect(failed?.reason == "the child process could not be prepared: ENOMEM")
        }
        #expect(try start { $0.start = .init(call: 4, errno: 12) } == nil)
        let run = try RealRun()
        var reasons: Set<String> = []
        for call in 1...run.preparationCalls {
            if let failed = try start({ $0.preparation = .init(call: call, errno: 13) }) {
                reasons.insert(failed.reason)
            }
        }
        #expect(reasons.contains("/dev/kvm can't be opened: EACCES"))
        #expect(reasons.contains("the child process could not be prepared: EACCES"))
        #expect(reasons.contains("the KVM of /dev/kvm lacks what a guest here needs"))
        #expect(reasons.contains("/dev/kvm is no KVM that this program knows"))
        _ = run
        #expect(sockets() == socketsBefore + 1 && shared() == sharedBefore + 1)
        #expect(Set(Process.children(own)).subtracting(children).count == 1)
    }

    @Test func `a worker that can't be started is told`() throws {
        let run = try RealRun()
        let calls = run.preparationCalls
        var options = RealRun.Options()
        options.preparation = .init(call: calls + 1, errno: 11)
        let other = try RealRun(options)
        #expect(throws: RealRun.Failure.unavailable(.init(reason: "no process can be started for a script: EAGAIN"))) {
            try other.answers(of: try Script("vm"))
        }
    }
}
