import Audit
import Frames
import HostMemory
import Synchronization
import Synchrony
import Testing

@testable import GuestMemory
@testable import Paging

// One x86 fault, from its lookup to the release of its page.

extension TDPMachine {
    /// One fault with `action` at its `point`th scheduling point; nil: it has fewer.
    func fault(_ access: AccessKind, _ frame: UInt64, point: Int, _ action: @escaping () -> Void) -> FaultOutcome? {
        if cpu.root == nil { mmu.loadRoot(cpu) }
        let interposer = Interposer(point, action)
        let outcome = interposer.run { fault(access, frame) }
        return interposer.hasFired ? outcome : nil
    }

    /// What guest faults took, gave back, and marked.
    func ofFaults(_ kind: Event.Kind) -> [Event] { events(kind).filter { $0.holder == .guestFault } }
    var marksByNumber: [Event] {
        (events(.markedDirty) + events(.markedAccessed)).filter { $0.holder == .heuristic }
    }
}

/// Renamed functions, so that the generic ones could have their names.
@Suite struct Patch37_LookupNames {
    @Test func `every entry that a fault installs has the frame that this fault's own lookup gave`() throws {
        let machine = TDPMachine(deviceFrames: 16)
        let bar = try #require(DeviceBAR(machine.test.host, pages: 4, filling: .byFault))
        try machine.slot(0, count: 4)
        try machine.slot(1, frame: 16, page: 16, count: 4, backing: .driver(bar))
        for frame in [0, 1, 16, 17] as [UInt64] {
            for access in [AccessKind.read, .write] { machine.fault(access, frame) }
        }
        var found: Event?
        var installed = 0
        for event in machine.journal.events {
            switch event.kind {
            case .fault: found = nil
            case .translated: found = event
            case .entryInstalled:
                installed += 1
                #expect(found?.frame == event.frame && found?.guest == event.guest)
            default: break
            }
        }
        #expect(installed >= 4)
    }
}

/// Each handler released its page itself; that they all did it right is no behaviour to take back.
@Suite struct Patch40_OneEndOfAFault {
    enum Tables: CaseIterable, Sendable { case twoDimensional, shadow }

    @Test(arguments: Tables.allCases, [AccessKind.read, .write])
    func `a page is released as often as it was got: once, whatever happens at whatever point`(
        tables: Tables, access: AccessKind
    ) throws {
        var point = 0
        var retried = 0
        while let events = try run(tables, access, point) {
            func count(_ kind: Event.Kind) -> Int {
                events.filter { $0.kind == kind && $0.holder == .guestFault }.count
            }
            #expect(count(.referenceTaken) == count(.released) && count(.released) == count(.referenceDropped))
            #expect(count(.forgotten) == 0)
            if count(.released) > 1 { retried += 1 }
            point += 1
        }
        #expect(point > 8 && retried > 0)
    }

    /// The events of an access during which the page is taken away at `point`.
    private func run(_ tables: Tables, _ access: AccessKind, _ point: Int) throws -> [Event]? {
        switch tables {
        case .twoDimensional:
            let guest = TestGuest()
            try guest.addMemory(0, 1)
            try guest.space.store(at(0), 1)
            let interposer = Interposer(point) {
                #expect(throws: Never.self) { try guest.space.advise(pages(0..<1), .dontNeed) }
            }
            interposer.mayFire = { !guest.cpus[0].isInGuest }
            _ = interposer.run { access == .write ? guest.store(0, 2) : guest.load(0) }
            #expect(guest.heldReferences == 0)
            return interposer.hasFired ? guest.test.journal.events : nil
        case .shadow:
            let guest = try PagedGuest()
            try guest.identityMap()
            try guest.space.store(at(9), 1)
            let interposer = Interposer(point) {
                #expect(throws: Never.self) { try guest.space.advise(pages(9..<10), .dontNeed) }
            }
            interposer.mayFire = { !guest.cpus[0].isInGuest }
            _ = interposer.run { guest.cpus[0].access(access == .write ? .store(2) : .load, at: 0x9000) }
            #expect(guest.test.journal.holdings.isEmpty)
            return interposer.hasFired ? guest.test.journal.events : nil
        }
    }

    @Test func `whatever comes out but a retry, the page was used`() throws {
        let machine = TDPMachine { $0.tracksWrites = true }
        try machine.slot(count: 4)
        for page in 0..<4 { try machine.space.store(at(page), 1) }
        try machine.mmu.track(GuestFrame(2))
        for (access, frame, outcome) in [
            (.write, 1, .fixed), (.read, 1, .spurious), (.write, 2, .writeProtected),
        ] as [(AccessKind, UInt64, FaultOutcome)] {
            let before = machine.ofFaults(.released).count
            #expect(machine.fault(access, frame) == outcome)
            let released = machine.ofFaults(.released).dropFirst(before)
            #expect(released.map { $0.value } == [UInt64(ReleaseKind.dirty.rawValue) | 0x100])
        }
    }
}

@Suite struct Patch41_MakingMarksNothing {
    @Test func `a read of a page that the host may write marks it dirty, once, when it is released`() throws {
        try checkPatch(41) {
            let machine = TDPMachine()
            try machine.slot(count: 4)
            try machine.space.store(at(1), 5)
            #expect(machine.fault(.read, 1) == .fixed)
            #expect(machine.ofFaults(.markedDirty).count == 1 && machine.marksByNumber.isEmpty)
            #expect(machine.journal.findings.isEmpty)
        }
    }

    @Test func `a fault that made its entry and lost the race to put it in marks nothing`() throws {
        try checkPatch(41) {
            let machine = TDPMachine()
            try machine.slot(count: 4)
            try machine.space.store(at(1), 5)
            // The tables are there, so the leaf is all that is written.
            machine.fault(.write, 2)
            machine.test.memory.forgetAccessedAndDirty()
            let marks = machine.events(.markedDirty).count
            let word = machine.word(1)
            var hasLost = false
            let task = TestTask { operation, _ in
                guard !hasLost, operation == SchedulingPoint.entryWrite.rawValue, isHeld(.mmu) else { return }
                hasLost = true
                TestTask.elsewhere { word.store(EntryBit.frozen) }
            }
            #expect(task.run { machine.fault(.read, 1) }.result == .retry)
            word.store(EntryBit.empty)
            #expect(hasLost && machine.events(.markedDirty).count == marks)
        }
    }
}

/// The lookup is the generic one, which does what x86's own did: first without waiting, then open to signals.
@Suite struct Patch44_FaultInGeneric {
    @Test func `a page that must be read is left to a worker where the guest allows it, else it is waited for`() throws
    {
        let guest = TestGuest()
        let object = try guest.addSlowMemory(3)
        let cpu = guest.cpus[0]
        cpu.allowsAsyncFaults = true
        #expect(guest.handle(0) == .retry && cpu.asyncFaults.count == 1 && object.frame(of: 0) == nil)
        cpu.allowsAsyncFaults = false
        #expect(guest.handle(1) == .fixed && object.frame(of: 1) != nil)
        #expect(guest.test.events(.translationFailed).count == 2, "the look that does not wait comes first")
        while guest.vm.asyncFaults.runOne() {}
        _ = guest.load(0)
    }

    @Test func `a signal ends the wait, and only that`() throws {
        let guest = TestGuest()
        _ = try guest.addSlowMemory(2)
        #expect(guest.handle(1) == .fixed)
        try guest.space.advise(pages(1..<2), .dontNeed)
        guest.space.signals.pending = true
        #expect(guest.handle(1) == .fixed, "nothing to wait for")
        #expect(guest.handle(0) == .failed(.EINTR) && guest.heldReferences == 0)
        guest.space.signals.pending = false
        #expect(guest.handle(0) == .fixed)
    }
}

@Suite struct Patch47_TheFaultsOwnPage {
    @Test func `the flags of pages that the fault has no reference to stay as they are`() throws {
        try checkPatch(47) {
            let machine = TDPMachine(deviceFrames: 16)
            let buffer = try #require(GraphicsBuffer(machine.test.host, pages: 4, order: 2))
            let bar = try #require(DeviceBAR(machine.test.host, pages: 4, filling: .byFault))
            let carveOut = try #require(ReservedMemory(machine.test.host, pages: 4))
            try machine.slot(0, frame: 0, page: 0, count: 4, backing: .driver(buffer))
            try machine.slot(1, frame: 16, page: 16, count: 4, backing: .driver(bar))
            try machine.slot(2, frame: 32, page: 32, count: 4, backing: .driver(carveOut))
            for frame in [0, 1, 16, 17, 32, 33] as [UInt64] {
                #expect(machine.fault(.write, frame) == .fixed && machine.fault(.read, frame) == .spurious)
                let flags = machine.test.memory.inspect(machine.leaf(frame)!.frame)?.headFlags
                #expect(flags?.isDirty(by: .kvm) != true && flags?.isAccessed(by: .kvm) != true)
            }
            #expect(machine.marksByNumber.isEmpty && machine.journal.findings.isEmpty)
        }
    }

    @Test func `a page is marked through the reference that the fault has`() throws {
        try checkPatch(47) {
            let machine = TDPMachine()
            try machine.slot(count: 4)
            for frame in UInt64(0)..<4 { machine.fault(.write, frame) }
            #expect(machine.ofFaults(.markedDirty).count == 4 && machine.ofFaults(.markedAccessed).count == 4)
            #expect(machine.marksByNumber.isEmpty && machine.journal.holdings.isEmpty)
        }
    }
}

@Suite struct Patch48_RetriedIsUnused {
    @Test(arguments: [AccessKind.read, .write])
    func `a fault that is to be tried again leaves no mark`(access: AccessKind) throws {
        try checkPatch(48) {
            var point = 0
            var released = 0
            while true {
                let machine = TDPMachine(ramFrames: 256)
                try machine.slot(count: 2)
                try machine.space.store(at(1), 5)
                // Nothing changes in it: another's notifier.
                let outcome = machine.fault(access, 1, point: point) {
                    machine.start(1..<2)
                    machine.end(1..<2)
                }
                guard let outcome else { break }
                if outcome == .retry {
                    released += machine.ofFaults(.released).count
                    let frame = machine.space.translate(at(1))!.frame
                    let flags = machine.test.state(frame).flags
                    #expect(!flags.isAccessed(by: .kvm) && !flags.isDirty(by: .kvm), "point \(point)")
                }
                point += 1
            }
            #expect(released > 0)
        }
    }
}
