import Audit
import Frames
import HostMemory
import Synchronization
import Synchrony
import Testing

@testable import GuestMemory
@testable import Machine

/// What comes between the steps of a private fault, at every place where another task can.
@Suite struct G3_4_PrivateRaces {
    /// Runs a fault on page 1 with `event` at each of its points; `settle` is what must hold of the outcome. At rest every
    /// leaf maps what the file has, or the test fails (I-25, I-6).
    private func interpose(
        _ event: @escaping (PrivateGuest, GuestMemoryFile) throws(Errno) -> Void, _ allowed: [FaultOutcome],
        atLeast: [FaultOutcome]
    ) throws {
        var outcomes: [FaultOutcome] = []
        for point in 0..<100 {
            let guest = PrivateGuest()
            let file = try guest.bound(4, private: 0..<4)
            guest.guest.store(1, 5)
            guest.vm.mmu.flushAll()
            let interposer = Interposer(point) { #expect(errno { () throws(Errno) in try event(guest, file) } == nil) }
            var outcome = FaultOutcome.retry
            interposer.run { outcome = guest.fault(1, .write) }
            guest.check()
            #expect(guest.guest.heldReferences == 0)
            guard interposer.hasFired else {
                #expect(point > 5)
                break
            }
            outcomes.append(outcome)
        }
        #expect(outcomes.allSatisfy(allowed.contains), "\(outcomes)")
        #expect(atLeast.allSatisfy(outcomes.contains), "\(outcomes)")
        #expect(outcomes.count < 100)
    }

    @Test func `a hole under a fault`() throws {
        try interpose(
            { (guest, file) throws(Errno) in try guest.punch(file, 1..<2) }, [.fixed, .retry],
            atLeast: [.fixed, .retry])
    }

    @Test func `a hole elsewhere makes a fault try again and hurts nobody`() throws {
        try interpose(
            { (guest, file) throws(Errno) in try guest.punch(file, 2..<4) }, [.fixed, .retry],
            atLeast: [.fixed, .retry])
    }

    @Test func `the last descriptor goes under a fault`() throws {
        try interpose(
            { (guest, file) throws(Errno) in guest.close(file) }, [.fixed, .retry, .memoryFault(.EFAULT)],
            atLeast: [.retry, .memoryFault(.EFAULT)])
    }

    @Test func `a change of attributes under a fault`() throws {
        try interpose(
            { (guest, file) throws(Errno) in try guest.makePrivate(1..<2, false) },
            [.fixed, .retry, .memoryFault(.EFAULT)], atLeast: [.fixed, .retry, .memoryFault(.EFAULT)])
    }

    @Test func `a page breaks under a fault`() throws {
        try interpose(
            { (guest, file) throws(Errno) in
                guard let frame = file.frame(of: 1), guest.test.host.poison(frame) else { throw .ENOENT }
                guest.brokenFrames = 1
            }, [.fixed, .retry, .memoryFault(.EHWPOISON)], atLeast: [.retry, .memoryFault(.EHWPOISON)])
    }

    /// Runs `event` with a fault on page 1 at each of its points, and another after it; at rest every leaf maps what the
    /// file has.
    private func interposeFault(
        in event: (PrivateGuest, GuestMemoryFile) throws(Errno) -> Void, _ allowed: [FaultOutcome]
    ) throws {
        for point in 0..<100 {
            let guest = PrivateGuest()
            let file = try guest.bound(4, private: 0..<4)
            guest.guest.store(1, 5)
            var outcomes: [FaultOutcome] = []
            let interposer = Interposer(point) {
                outcomes.append(guest.faultOnly(1))
                outcomes.append(guest.faultOnly(3))
            }
            interposer.ignoring(.slots)
            interposer.ignoring(.fileInvalidate)
            try interposer.run { try event(guest, file) }
            #expect(outcomes.allSatisfy(allowed.contains), "\(outcomes) at point \(point)")
            #expect(guest.vm.checkBindings().isEmpty, "at point \(point)")
            guest.vm.runPostponedWork()
            guest.check()
            guard interposer.hasFired else {
                #expect(point > 3)
                return
            }
        }
        Issue.record("there are more points than were tried")
    }

    @Test func `a fault in the middle of a hole`() throws {
        try interposeFault(
            in: { (guest, file) throws(Errno) in try guest.punch(file, 1..<2) }, [.fixed, .spurious, .retry])
    }

    @Test func `a fault while the last descriptor goes`() throws {
        try interposeFault(
            in: { (guest, file) throws(Errno) in guest.close(file) },
            [.fixed, .spurious, .retry, .memoryFault(.EFAULT)])
    }

    @Test func `a fault in the middle of a change of attributes`() throws {
        try interposeFault(
            in: { (guest, file) throws(Errno) in try guest.makePrivate(1..<2, false) },
            [.fixed, .spurious, .retry])
        try interposeFault(
            in: { (guest, file) throws(Errno) in
                try guest.makePrivate(1..<2, false)
                try guest.makePrivate(1..<2)
            }, [.fixed, .spurious, .retry])
    }

    @Test func `a fault while a page breaks`() throws {
        try interposeFault(
            in: { (guest, file) throws(Errno) in
                guard let frame = file.frame(of: 1), guest.test.host.poison(frame) else { throw .ENOENT }
                guest.brokenFrames = 1
            }, [.fixed, .spurious, .retry, .memoryFault(.EHWPOISON)])
    }

    /// A fault that puts the file's last reference leaves the release to a moment without locks.
    @Test func `a fault may be the last to let go of a file`() throws {
        var postponed = 0
        for point in 0..<100 {
            let guest = PrivateGuest()
            let file = try guest.bound(4, private: 0..<4)
            let interposer = Interposer(point) { guest.close(file) }
            interposer.run {
                guest.vm.withSlots {
                    _ = guest.vm.mmu.handleFault(
                        guest.guest.cpus[0],
                        GuestFault(address: gfn(1).address, access: .write, entryPresent: false))
                    if !guest.vm.guestMemoryFiles.isEmpty, interposer.hasFired { postponed += 1 }
                }
            }
            // The next entry into the guest does it.
            _ = guest.guest.load(3)
            #expect(guest.vm.guestMemoryFiles.isEmpty == interposer.hasFired)
            guest.check()
            guard interposer.hasFired else { break }
        }
        #expect(postponed > 0)
    }
}

@Suite(.serialized) struct G3_4_PrivateThreads {
    /// vCPUs write private pages and read them back, while holes are punched, attributes change, and a page is made and
    /// taken away. What a vCPU reads is what it wrote, or zero.
    @Test func `guests beside holes and changes of attributes`() async throws {
        let seed = UInt64.random(in: 1 ... .max)
        print("seed \(seed)")
        let guest = PrivateGuest(ramFrames: 1024, cpus: 2)
        let file = try guest.bound(16, private: 0..<16)
        for cpu in guest.guest.cpus { cpu.patience = 1_000_000 }
        let done = Flag()
        let rounds = 3000
        var bodies: [@Sendable () throws -> Void] = [
            {
                var random = TestRandom(seed: seed &+ 7)
                while !done.isRaised {
                    let low = Int.random(in: 0..<16, using: &random)
                    try guest.punch(file, low..<Int.random(in: low + 1...16, using: &random))
                }
            },
            {
                var random = TestRandom(seed: seed &+ 8)
                while !done.isRaised {
                    let low = Int.random(in: 12..<16, using: &random)
                    try guest.makePrivate(
                        low..<Int.random(in: low + 1...16, using: &random), Bool.random(using: &random))
                }
            },
        ]
        for cpu in 0..<2 {
            bodies.append {
                defer { done.raise() }
                var random = TestRandom(seed: seed &+ UInt64(cpu))
                for round in 1...rounds { try work(guest, cpu, UInt64(round), &random) }
            }
        }
        try await onThreads(bodies)
        guest.check()
    }

    /// Writes a page and reads it back. Each vCPU has pages of its own; those from 12 on change their attribute.
    private func work(_ guest: PrivateGuest, _ cpu: Int, _ round: UInt64, _ random: inout TestRandom) throws {
        let page = Int.random(in: 0..<8, using: &random) * 2 + cpu
        let value = round << 8 | UInt64(page)
        let stored = guest.guest.store(page, value, cpu: cpu)
        guard try permit(stored == .stored, stored, guest, page, cpu) else { return }
        let loaded = guest.guest.load(page, cpu: cpu)
        if loaded == .value(value) || loaded == .value(0) { return }
        if page >= 12, case .value(let old) = loaded, old & 0xff == UInt64(page) { return }
        _ = try permit(false, loaded, guest, page, cpu)
    }

    private struct Wrong: Error {
        let page: Int
        let result: AccessResult
    }

    /// A frame that changed its attribute between the fault's two looks is userspace's business, and tried again.
    private func permit(
        _ good: Bool, _ result: AccessResult, _ guest: PrivateGuest, _ page: Int, _ cpu: Int
    ) throws -> Bool {
        if good { return true }
        if page >= 12, result == .failed(.EFAULT), guest.guest.cpus[cpu].memoryFault != nil { return false }
        throw Wrong(page: page, result: result)
    }

    /// The file goes while vCPUs fault on it: each either gets its page or is told, and nothing is left.
    @Test func `the last descriptor goes while guests run`() async throws {
        for _ in 0..<30 {
            let guest = PrivateGuest(ramFrames: 512, cpus: 2)
            let file = try guest.bound(16, private: 0..<16)
            for cpu in guest.guest.cpus { cpu.patience = 1_000_000 }
            let begun = Flag()
            var bodies: [@Sendable () throws -> Void] = [
                {
                    while !begun.isRaised { yieldProcessor() }
                    guest.close(file)
                }
            ]
            for cpu in 0..<2 {
                bodies.append {
                    for round in 0..<200 {
                        let result = guest.guest.store(round % 16, 1, cpu: cpu)
                        begun.raise()
                        if result == .stored { continue }
                        guard result == .failed(.EFAULT), guest.guest.cpus[cpu].memoryFault?.isPrivate == true
                        else { throw Wrong(page: round % 16, result: result) }
                    }
                }
            }
            try await onThreads(bodies)
            guest.vm.runPostponedWork()
            #expect(guest.vm.guestMemoryFiles.isEmpty && guest.guest.leafCount == 0)
            guest.check()
        }
    }

    /// Slots come and go over a file that closes: the two holes of Linux 6.13 by real threads.
    @Test func `slots are deleted while their file is closed`() async throws {
        for _ in 0..<60 {
            let guest = PrivateGuest(ramFrames: 512, cpus: 1)
            let file = try guest.bound(8, private: 0..<8)
            guest.guest.store(1, 1)
            try await onThreads([
                { guest.close(file) },
                { try guest.guest.deleteSlot() },
            ])
            #expect(guest.vm.guestMemoryFiles.isEmpty && guest.guest.leafCount == 0)
            guest.check()
        }
    }
}
