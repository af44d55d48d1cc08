import Audit
import Frames
import Machine
import Synchrony
import Testing

@testable import GuestMemory
@testable import HostMemory

@Suite struct Patch13_TranslationsMightSleep {
    @Test func `under a spinning lock a translation is a violation, also when it finds its page at once`() throws {
        try checkPatch(13) {
            let guest = TestGuest()
            try guest.addMemory(0, 1)
            try guest.space.store(at(0), 1)
            withoutSleeping { _ = guest.follow(0, write: true) }
            #expect(LockViolations.ofCurrentTask().sleeping > 0)
            LockViolations.clear()
        }
    }
}

@Suite struct Patch14_KilledIsSignal {
    @Test func `a task that is killed before it gets mmap_lock is interrupted, not faulted`() throws {
        try checkPatch(14) {
            let guest = TestGuest()
            try guest.addMemory(0, 1)
            guest.space.signals.fatal = true
            for write in [false, true] { #expect(guest.faultIn(0, write: write) == .failed(.signalPending)) }
            #expect(guest.store(0, 1) == .failed(.EINTR))
            guest.space.signals.fatal = false
            #expect(guest.store(0, 1) == .stored)
        }
    }
}

@Suite struct Patch15_OneLookForPoison {
    @Test func `a failing lookup takes mmap_lock once for get-user-pages and once for the VMA`() throws {
        try checkPatch(15) {
            for write in [false, true] {
                let guest = TestGuest()
                try guest.setSlot(pages: 1)
                let counter = PointCounter(.lockAcquireShared, guest.space.mmapLock.identity.value)
                let answer = counter.run { guest.follow(0, write: write, wantsWritable: true) }
                #expect(answer == .failed(.fault) && counter.count == 2)
            }
        }
    }

    @Test func `poison is still told`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        try guest.space.store(at(0), 1)
        guest.test.host.poison(try #require(guest.frame(0)))
        for write in [false, true] {
            for noWait in [false, true] {
                #expect(guest.faultIn(0, write: write, noWait: noWait) == .failed(.hardwarePoison))
            }
        }
    }
}

@Suite struct Patch16_NeedsIO {
    @Test func `a page that must be waited for is an answer of its own, and no page`() throws {
        try checkPatch(16) {
            let guest = TestGuest()
            let object = MemoryObject(host: guest.test.host, pages: 1, slow: true)
            try guest.space.mapPages(0, 1, .object(object))
            try guest.setSlot(pages: 1)
            for write in [false, true] {
                #expect(guest.faultIn(0, write: write, noWait: true) == .failed(.needsIO))
                #expect(guest.heldReferences == 0)
            }
            #expect(guest.faultIn(0, write: true) == .page(object.frame(of: 0), writable: true))
        }
    }
}

/// One way for all translations, with the answers of before.
@Suite struct Patch19_FollowFrame {
    /// Where get-user-pages serves, the policies differ in who keeps the reference, not in what is found.
    @Test(arguments: 0..<8) func `random requests are answered alike with and without the series`(round: Int) throws {
        let seed = UInt64.random(in: 1 ... .max)
        var random = TestRandom(seed: seed)
        let guests = [PolicyName.precise, .guess].map { TestGuest(policy: $0, keepsEvents: false) }
        var kinds: [Int] = []
        for _ in 0..<24 { kinds.append(Int.random(in: 0..<7, using: &random)) }
        let touched = (0..<24).filter { _ in Bool.random(using: &random) }
        for guest in guests { try fill(guest, kinds, touched) }
        for _ in 0..<300 {
            let page = Int.random(in: 0..<25, using: &random)
            let (write, wants) = (Bool.random(using: &random), Bool.random(using: &random))
            let noWait = Bool.random(using: &random)
            let answers = guests.map { guest in
                let answer = guest.follow(page, write: write, wantsWritable: wants, noWait: noWait)
                if answer.error == nil { #expect(answer.frame == guest.frame(page), "seed \(seed)") }
                return answer
            }
            #expect(answers[0].error == answers[1].error, "seed \(seed), page \(page) of kind \(kinds)")
            #expect(answers[0].writable == answers[1].writable && answers[0].references == answers[1].references)
        }
        for guest in guests { #expect(guest.heldReferences == 0) }
    }

    private func fill(_ guest: TestGuest, _ kinds: [Int], _ touched: [Int]) throws {
        let host = guest.test.host
        for (page, kind) in kinds.enumerated() {
            switch kind {
            case 0, 1: try guest.space.mapPages(page, 1)
            case 2: try guest.space.mapPages(page, 1, .anonymous, .read)
            case 3: try guest.space.mapPages(page, 1, .object(MemoryObject(host: host, pages: 1)))
            case 4: try guest.space.mapPages(page, 1, .object(MemoryObject(host: host, pages: 1), shared: false))
            case 5: try guest.space.mapPages(page, 1, .object(MemoryObject(host: host, pages: 1, slow: true)))
            default: break
            }
            if touched.contains(page), kind < 6 {
                _ = try guest.space.load(at(page))
                if kind != 2, page % 2 == 0 { try guest.space.store(at(page), 1) }
            }
        }
        try guest.setSlot(0, pages: 20)
        try guest.setSlot(1, guest: 20, pages: 4, readOnly: true)
    }
}

/// One page in the place of an array of one.
@Suite struct Patch26_OnePage {
    @Test func `fast or slow, for reading or for writing, one page with one reference`() throws {
        let guest = TestGuest(ramFrames: 4096, thp: true)
        try guest.addMemory(0, 512)
        #expect(guest.follow(3, write: true).references == 1, "slow")
        #expect(guest.space.translate(at(3))?.level == .page2M)
        for (write, wants) in [(false, false), (false, true), (true, false)] {
            #expect(
                guest.follow(5, write: write, wantsWritable: wants) == .page(guest.frame(5), writable: write || wants))
        }
        #expect(guest.heldReferences == 0)
    }
}

@Suite struct Patch27_PageIsReported {
    @Test func `a page that get-user-pages gave is the fault's own; of all else there is none`() throws {
        try checkPatch(27) {
            let guest = TestGuest()
            let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .atMap))
            try guest.space.mapPages(0, 1)
            try guest.space.mapPages(1, 1, .driver(bar))
            try guest.setSlot(pages: 3)
            for write in [false, true] {
                guest.vm.withSlots {
                    for page in 0..<3 {
                        let slot = guest.vm.slot(containing: gfn(page))
                        switch guest.vm.faultIn(gfn(page), slot: slot, write: write, snapshot: guest.vm.snapshot()) {
                        case .failed: #expect(page == 2)
                        case .frame(let faulted):
                            let owns = faulted.ownsReference
                            #expect(owns == (page == 0))
                            #expect(guest.test.journal.holdings.map(\.holder) == (page == 0 ? [.guestFault] : []))
                            faulted.releaseUnused()
                        }
                        #expect(guest.test.journal.holdings.isEmpty)
                    }
                }
            }
        }
    }
}

/// Moved declarations.
@Suite struct Patch42_SlotLookupsMoved {
    @Test func `slot and user address of a guest frame`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 4)
        try guest.setSlot(0, pages: 2)
        try guest.setSlot(1, guest: 2, pages: 2, readOnly: true)
        #expect(guest.vm.slot(containing: gfn(1))?.id == 0 && guest.vm.slot(containing: gfn(2))?.id == 1)
        #expect(guest.vm.slot(containing: gfn(4)) == nil)
        #expect(guest.vm.userAddress(of: gfn(1)) == at(1))
        #expect(guest.vm.userAddress(of: gfn(3)) == nil && guest.vm.userAddress(of: gfn(3), write: false) == at(3))
    }
}

@Suite struct Patch49_ReleasedUnderTheLock {
    @Test(arguments: Architecture.twoStage)
    func `a fault that used its page releases it before mmu_lock is dropped`(architecture: Architecture) throws {
        try checkPatch(49) {
            let guest = TestGuest(architecture)
            try guest.addMemory(0, 2)
            #expect(guest.store(0, 1) == .stored && guest.load(1) == .value(0))
            guest.fault(0, write: true, .used(dirty: true))
            let used = guest.test.events(.released).filter { $0.value & 0xff != UInt64(ReleaseKind.unused.rawValue) }
            #expect(used.count >= 3 && used.allSatisfy { $0.value & 0x100 != 0 })
        }
    }

    @Test func `unused it may be released anywhere`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        #expect(guest.faultIn(0, write: true).references == 1)
        #expect(guest.test.journal.findings.isEmpty)
    }
}

@Suite struct Patch85_MappedPagesAreNotCounted {
    @Test(arguments: G2_6_Remapped.kinds)
    func `no reference is taken, and none refused, because a page frame stands behind the number`(
        kind: G2_6_Remapped.Kind
    ) throws {
        let hasCount = try isCounted(kind)
        let body = {
            let guest = TestGuest()
            let (driver, frame) = try kind.make(guest.test.host)
            try guest.space.mapPages(0, 2, .driver(driver))
            try guest.setSlot(pages: 2)
            let before = guest.test.memory.inspect(frame)
            for write in [false, true] {
                #expect(guest.faultIn(1, write: write) == .mapped(frame, writable: true))
            }
            #expect(guest.store(1, 4) == .stored && guest.load(1) == .value(4))
            #expect(guest.leaf(1)?.frame == frame)
            #expect(guest.test.memory.inspect(frame) == before)
            #expect(guest.test.events(.referenceTaken).isEmpty)
        }
        // Frames without page frames, and reserved ones, have never been counted.
        if hasCount { try checkPatch(85, body) } else { try body() }
    }

    /// Whether the heuristic takes the frame for a counted one, or for one whose count must be 0.
    private func isCounted(_ kind: G2_6_Remapped.Kind) throws -> Bool {
        let test = TestHost(deviceFrames: 64)
        let (driver, frame) = try kind.make(test.host)
        return withExtendedLifetime(driver) {
            guard let state = test.memory.inspect(frame) else { return false }
            return !state.flags.isReserved
        }
    }
}
