import Audit
import Frames
import Paging
import Synchrony
import Testing

@testable import GuestMemory
@testable import HostMemory
@testable import Machine

/// Every rule that is checked at a step, broken: the check must fire at that step, before anything is at rest. What is
/// broken is either the core, by a defect of the museum, or what the core told, by an event that should not have come.
@Suite struct StepSabotage_EachRuleFires {
    /// A clean world whose guest has written pages 0 to 3.
    private func written(
        _ kind: RegionKind = .anonymous, _ architecture: Architecture = .x86TDP, pages: UInt64 = 8,
        _ change: (inout Plan) -> Void = { _ in }
    ) throws -> TestWorld {
        let test = try TestWorld(kind, pages: pages, architecture: architecture, change)
        for page in 0..<UInt64(4) { #expect(test.guest(.write, page: page, page) == .stored) }
        #expect(test.found.isEmpty, "clean before the break")
        return test
    }

    private static let architectures = Architecture.twoStage

    // MARK: Nothing fires while nothing is broken

    @Test(arguments: architectures)
    func `every kind of change, and the tables are as the events told`(_ architecture: Architecture) throws {
        let test = try written(.anonymous, architecture)
        let range = TestWorld.user..<(TestWorld.user + 4096)
        try test.world.addressSpace.advise(range, .dontNeed)
        #expect(test.guest(.read, page: 0) == .value(0))
        #expect(test.guest(.write, page: 0, 5) == .stored)
        try test.world.addressSpace.protect(range, Protection(read: true, write: false))
        #expect(test.guest(.read, page: 0) == .value(5))
        // RISC-V refuses a writable slot over memory that may not be written.
        try test.world.addressSpace.protect(range, Protection(read: true, write: true))
        try test.vm.setMemoryRegion(test.region(size: 0))
        #expect(test.guest(.read, page: 1) == .mmio)
        try test.vm.setMemoryRegion(test.region(size: 8 * pageSize))
        #expect(test.guest(.read, page: 1) == .value(1))
        test.world.endPhase(0)
        #expect(test.found == [])
    }

    @Test(arguments: architectures)
    func `a huge leaf that is split, unmapped in part and joined again`(_ architecture: Architecture) throws {
        let test = try written(.anonymous, architecture, pages: 512) { $0.transparentHugePages = true }
        #expect(test.leaf(3)?.level == .page2M)
        try test.vm.setMemoryRegion(test.region(size: 512 * pageSize, logged: true))
        #expect(test.guest(.write, page: 3, 1) == .stored)
        test.world.endPhase(0)
        try test.world.addressSpace.advise((TestWorld.user + 8192)..<(TestWorld.user + 12288), .dontNeed)
        #expect(test.guest(.write, page: 2, 1) == .stored)
        try test.vm.setMemoryRegion(test.region(size: 512 * pageSize))
        for page in 0..<UInt64(8) { #expect(test.guest(.write, page: page, 1) == .stored) }
        test.world.endPhase(0)
        #expect(test.found == [])
    }

    // MARK: Entries

    @Test func `I-6: an entry is made for another frame than the process's`() throws {
        let test = try written()
        test.install(page: 5, frame: try #require(test.frame(1)))
        #expect(test.found == [.i6])
    }

    @Test func `I-6: an entry is made for a free page`() throws {
        let test = try written()
        test.install(page: 5, frame: try test.freeFrame())
        #expect(test.found == [.i6])
        #expect(test.journal.findings.count == 2, "free, and not what the process maps")
    }

    @Test func `I-7: a writable entry is made over a page that the process may not write`() throws {
        let test = try written()
        let range = TestWorld.user..<(TestWorld.user + 4096)
        try test.world.addressSpace.protect(range, Protection(read: true, write: false))
        test.install(page: 0, frame: try #require(test.frame(0)))
        #expect(test.found == [.i7])
    }

    @Test func `I-7: the lockless path gives W back where the process may not write`() throws {
        let test = try written()
        let range = TestWorld.user..<(TestWorld.user + 4096)
        try test.world.addressSpace.protect(range, Protection(read: true, write: false))
        #expect(test.guest(.read, page: 0) == .value(0))
        #expect(test.found.isEmpty)
        test.change(page: 0, frame: try #require(test.frame(0)), writable: true)
        #expect(test.found == [.i7])
    }

    @Test func `I-18: an entry is made for what is no memory`() throws {
        let test = try written()
        test.install(page: 5, frame: HostFrame(0xf_ffff_ffff))
        #expect(test.found == [.i18])
    }

    @Test func `I-21: an entry is made where there is no slot`() throws {
        let test = try written()
        test.install(page: 100, frame: try #require(test.frame(0)))
        #expect(test.found == [.i21])
    }

    @Test func `I-21: a slot goes and an entry stays`() throws {
        let test = try written()
        test.install(page: 100, frame: try #require(test.frame(0)))
        let before = test.journal.findings.count
        test.journal.record(Event(.slotDeleted, guest: 100))
        #expect(test.journal.findings.dropFirst(before).map(\.invariant) == [.i21])
    }

    /// X16: a fault that found the slot valid may still install when it has become INVALID; the deletion waits for it. The
    /// zap then takes the entry, and afterwards there is no slot to install through.
    @Test(arguments: architectures)
    func `an entry that is made while its slot is INVALID is no finding`(_ architecture: Architecture) throws {
        let test = try written(.anonymous, architecture)
        #expect(test.guest(.read, page: 0) == .value(0))
        var made = 0
        for point in 0..<40 {
            let interposer = Interposer(point) {
                guard let slot = test.vm.slot(containing: GuestFrame(6)), slot.isInvalid,
                    let frame = test.frame(0)
                else { return }
                made += 1
                test.install(page: 0, frame: frame)
                test.zapEvent(page: 0, frame: frame)
            }
            interposer.ignoring(.slots)
            try interposer.run { try test.vm.setMemoryRegion(test.region(size: 0)) }
            #expect(test.found == [], "at point \(point)")
            try test.vm.setMemoryRegion(test.region(size: 8 * pageSize))
            #expect(test.guest(.read, page: 0) == .value(0))
        }
        #expect(made > 0, "no point of a deletion is passed with the slot INVALID")
    }

    @Test func `I-23: a writable entry is made in a read-only slot`() throws {
        let test = try TestWorld(.anonymous) { $0.slots[0].readOnly = true }
        try test.world.addressSpace.store(TestWorld.user, 1)
        test.install(page: 0, frame: try #require(test.frame(0)))
        #expect(test.found == [.i23])
    }

    @Test func `X12: an entry is made while an invalidation of its frame is in progress`() throws {
        let test = try written()
        let range = TestWorld.user..<(TestWorld.user + 4096)
        test.vm.invalidateRangeStart(range, blockable: true)
        test.install(page: 0, frame: try #require(test.frame(0)))
        #expect(test.found == [.x12])
        test.vm.invalidateRangeEnd(range)
    }

    @Test func `an entry outside of the range of a running invalidation is no finding`() throws {
        let test = try written()
        let range = TestWorld.user..<(TestWorld.user + 4096)
        test.vm.invalidateRangeStart(range, blockable: true)
        test.install(page: 1, frame: try #require(test.frame(1)))
        #expect(test.found == [])
        test.vm.invalidateRangeEnd(range)
    }

    @Test func `X38: a huge entry reaches beyond its slot`() throws {
        let test = try written()
        test.install(page: 0, frame: try #require(test.frame(0)), level: .page2M)
        #expect(test.found == [.x38])
    }

    @Test func `X38: an entry is larger than what the process maps`() throws {
        let test = try TestWorld(.anonymous, pages: 512) { $0.transparentHugePages = true }
        #expect(test.guest(.write, page: 3, 1) == .stored)
        let frame = try #require(test.frame(0))
        // The process's huge page is split, and still maps the same frames.
        try test.world.addressSpace.protect(
            (TestWorld.user + 4096)..<(TestWorld.user + 8192), Protection(read: true, write: false))
        #expect(test.found.isEmpty)
        test.install(page: 0, frame: frame, level: .page2M)
        #expect(test.found == [.x38])
    }

    @Test func `I-7: an entry that no event told of`() throws {
        let test = try written()
        test.zapEvent(page: 2, frame: try #require(test.frame(2)))
        test.world.endPhase(0)
        #expect(test.found == [.i7])
    }

    // MARK: Memory that goes

    @Test(arguments: architectures)
    func `X11 and I-13: the notifier's start returns without its flush`(_ architecture: Architecture) throws {
        let test = try written(.anonymous, architecture)
        let range = TestWorld.user..<(TestWorld.user + 4096)
        // RISC-V flushes at each entry made: page 0 has to come into the TLB again.
        #expect(test.guest(.read, page: 0) == .value(0))
        _ = try TestTask(defects: [.flushMissing]).run { try test.world.addressSpace.advise(range, .dontNeed) }
        #expect(test.journal.findings.first?.invariant == .x11)
        #expect(test.found == [.x11, .i13])
        // And the guest goes on with it.
        let before = test.journal.findings.count
        #expect(test.guest(.read, page: 0) == .value(0))
        #expect(test.journal.findings.dropFirst(before).map(\.invariant) == [.i13])
    }

    @Test func `X11: an entry still maps the range when the notifier's start has returned`() throws {
        let test = try written()
        test.cpu.dropTranslations()
        test.world.stepChecks.invalidationStarted(TestWorld.user.page, 1)
        #expect(test.found == [.x11])
    }

    @Test func `I-6 and I-7: the process's entry changes under a stage-2 entry`() throws {
        let test = try written()
        let entry = try #require(test.leaf(0))
        test.zap(1)
        // As if the zap had never been.
        try test.world.addressSpace.protect(
            TestWorld.user..<(TestWorld.user + 4096), Protection(read: true, write: false))
        test.journal.observer = nil
        test.install(page: 0, frame: entry.frame)
        test.journal.observer = test.world.stepChecks
        #expect(test.found.isEmpty)
        test.remember(page: 0, frame: entry.frame)
        test.journal.record(Event(.hostEntrySet, frame: entry.frame, guest: TestWorld.user.page, level: 1))
        #expect(test.found.contains(.i7))
        try test.world.addressSpace.unmap(TestWorld.user..<(TestWorld.user + 4096))
        #expect(test.found.isSuperset(of: [.i6, .x11]))
    }

    @Test func `I-6 and I-13: a page is freed under an entry and a TLB`() throws {
        let test = try written()
        test.journal.record(Event(.pageFreed, frame: test.frame(0), value: 0))
        #expect(test.found == [.i6, .i13])
    }

    @Test func `I-6: a TLB whose flush is posted, outside of guest mode, is no finding`() throws {
        let test = try written()
        test.vm.flushRemoteTLBs()
        test.journal.record(Event(.pageFreed, frame: test.frame(0), value: 0))
        #expect(test.found == [.i6])
    }

    @Test func `I-2: a page is freed while KVM holds it`() throws {
        let test = try written()
        let frame = try test.freeFrame()
        test.journal.record(Event(.referenceTaken, holder: .guestFault, frame: frame))
        test.journal.record(Event(.pageFreed, frame: frame, value: 0))
        #expect(test.found == [.i2])
    }

    /// On RISC-V a table that becomes empty takes a flush with it.
    @Test func `I-13: a driver gives its block back while a TLB maps it`() throws {
        let test = try written(.graphicsBuffer)
        let before = test.journal.findings.count
        _ = try TestTask(defects: [.flushMissing]).run { try test.world.regions[0].move(toDeviceMemory: true) }
        let reasons = test.journal.findings.dropFirst(before).map(\.reason)
        #expect(reasons.contains("a driver gives memory back while a vCPU's TLB maps it"))
    }

    @Test func `I-6: a driver gives its block back while an entry maps it`() throws {
        let test = try written(.graphicsBuffer)
        test.cpu.dropTranslations()
        test.world.stepChecks.givenBack(try #require(test.frame(0)).number, 1)
        #expect(test.found == [.i6])
    }

    // MARK: The guest's accesses

    @Test func `I-13: the guest reaches another page than the process maps`() throws {
        let test = try written()
        test.world.stepChecks.accessed(0, try #require(test.frame(1)).number, isStore: false)
        #expect(test.found == [.i13])
    }

    @Test func `I-13: the guest reaches a free page`() throws {
        let test = try written()
        test.world.stepChecks.accessed(0, try test.freeFrame().number, isStore: false)
        #expect(test.found == [.i13])
    }

    @Test func `I-13: the guest writes what the process may not`() throws {
        let test = try written()
        let frame = try #require(test.frame(0)).number
        try test.world.addressSpace.protect(
            TestWorld.user..<(TestWorld.user + 4096), Protection(read: true, write: false))
        test.world.stepChecks.accessed(0, frame, isStore: false)
        #expect(test.found == [])
        test.world.stepChecks.accessed(0, frame, isStore: true)
        #expect(test.found == [.i13])
    }

    @Test func `I-21: the guest reaches memory whose slot is gone`() throws {
        let test = try written()
        test.world.stepChecks.accessed(100, try #require(test.frame(0)).number, isStore: false)
        #expect(test.found == [.i21])
    }

    @Test func `I-23: the guest writes a read-only slot`() throws {
        let test = try TestWorld(.anonymous) { $0.slots[0].readOnly = true }
        try test.world.addressSpace.store(TestWorld.user, 1)
        test.world.stepChecks.accessed(0, try #require(test.frame(0)).number, isStore: true)
        #expect(test.found == [.i23])
    }

    // MARK: The log

    private func logged(manual: Bool = false) throws -> TestWorld {
        let test = try TestWorld(.anonymous) { $0.slots[0].logDirtyPages = true }
        if manual { _ = test.step(.enableManualProtect(initiallySet: false)) }
        #expect(test.guest(.write, page: 0, 1) == .stored)
        return test
    }

    @Test func `I-12: the lockless path does not log what it makes writable`() throws {
        let test = try logged()
        #expect(test.step(.getDirtyLog(id: 0)) == .pages([0]))
        _ = TestTask(defects: [.fastFaultUnlogged]).run { #expect(test.guest(.write, page: 0, 2) == .stored) }
        test.world.endPhase(0)
        #expect(test.found == [.i12, .x44])
    }

    @Test func `X44: the log is read and a page outside of it stays writable`() throws {
        let test = try logged()
        _ = test.vm.activeSlots[0].dirtyBitmap?.take(0)
        #expect(test.step(.getDirtyLog(id: 0)) == .pages([]))
        #expect(test.found == [.x44])
    }

    @Test func `X44: a page between the two halves of the lockless path is no finding`() throws {
        let test = try logged()
        #expect(test.step(.getDirtyLog(id: 0)) == .pages([0]))
        let frame = try #require(test.frame(0))
        test.change(page: 0, frame: frame, writable: true)
        _ = test.step(.getDirtyLog(id: 0))
        #expect(test.found == [])
        test.journal.record(Event(.dirtyLogged, guest: 0))
        _ = test.step(.getDirtyLog(id: 0))
        #expect(test.found == [.x44], "logged, and the log has lost it")
    }

    @Test func `I-12: what GET only copied is not reported yet`() throws {
        let test = try logged(manual: true)
        #expect(test.step(.getDirtyLog(id: 0)) == .pages([0]))
        _ = test.vm.activeSlots[0].dirtyBitmap?.take(0)
        test.world.endPhase(0)
        #expect(test.found.contains(.i12))
    }

    @Test func `what CLEAR cleared is reported`() throws {
        let test = try logged(manual: true)
        #expect(test.step(.getDirtyLog(id: 0)) == .pages([0]))
        #expect(test.step(.clearDirtyLog(id: 0, firstPage: 0, pages: 8)) == .done)
        #expect(test.step(.getDirtyLog(id: 0)) == .pages([]))
        test.world.endPhase(0)
        #expect(test.found == [])
    }
}

extension TestWorld {
    /// The rules that steps have broken so far.
    fileprivate var found: Set<Invariant> { Set(journal.findings.map(\.invariant)) }

    fileprivate func region(size: UInt64, logged: Bool = false) -> MemoryRegion {
        MemoryRegion(
            slot: 0, flags: SlotFlags(logDirtyPages: logged), guestAddress: GuestAddress(0), size: size,
            userAddress: Self.user)
    }

    fileprivate func step(_ action: Action) -> StepOutcome { world.run(StepPlan(action), .host).0 }

    private func entry(writable: Bool) -> UInt64 { 1 << 11 | 1 | (writable ? 2 : 0) }

    /// What the MMU tells when it makes a writable entry.
    fileprivate func install(page: UInt64, frame: HostFrame, level: PageLevel = .page4K) {
        let isRISCV = world.architecture != .x86TDP
        journal.record(
            Event(
                .entryInstalled, frame: frame, guest: page, level: level.rawValue,
                value: isRISCV ? 0 : entry(writable: true)))
    }

    /// The checks believe in an entry that nobody made, and the findings of its making are not looked at.
    fileprivate func remember(page: UInt64, frame: HostFrame) { install(page: page, frame: frame) }

    fileprivate func change(page: UInt64, frame: HostFrame, writable: Bool) {
        journal.record(
            Event(.entryChanged, frame: frame, guest: page, level: 1, value: entry(writable: writable)))
    }

    fileprivate func zapEvent(page: UInt64, frame: HostFrame) {
        journal.record(Event(.entryZapped, frame: frame, guest: page, level: 1))
    }

    /// A frame in the free lists.
    fileprivate func freeFrame() throws -> HostFrame {
        try #require(
            (1..<UInt64(world.plan.ramFrames)).map { HostFrame($0) }.first {
                world.host.memory.inspect($0)?.flags.isFree == true
            })
    }
}
