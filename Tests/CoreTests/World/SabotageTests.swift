import Audit
import Frames
import Paging
import Synchrony
import Testing

@testable import GuestMemory
@testable import HostMemory
@testable import Machine

/// Every rule that a run checks, broken on purpose behind the core's back: the check must fire. Before each break the
/// same world is clean, so that what fires is the break.
@Suite struct Sabotage_EachRuleFires {
    /// A clean world whose guest has written pages 0 to 3.
    private func written(
        _ kind: RegionKind = .anonymous, _ architecture: Architecture = .x86TDP,
        _ change: (inout Plan) -> Void = { _ in }
    ) throws -> TestWorld {
        let test = try TestWorld(kind, architecture: architecture, change)
        for page in 0..<UInt64(4) { #expect(test.guest(.write, page: page, page) == .stored) }
        #expect(test.brokenRules().isEmpty, "clean before the break")
        return test
    }

    /// The entry that maps guest page `page`, raw.
    private func word(_ test: TestWorld, _ page: UInt64) throws -> AtomicWord {
        let leaf = try #require(test.leaf(page))
        let memory = test.world.host.memory
        for frame in 1..<UInt64(test.world.plan.ramFrames) {
            guard let state = memory.inspect(HostFrame(frame)), state.flags.bits & PageFlags.table != 0 else {
                continue
            }
            for index in 0..<512 {
                let word = memory.entry(index, of: HostFrame(frame))
                if word.load() == leaf.entry { return word }
            }
        }
        throw Missing()
    }
    private struct Missing: Error {}

    private func change(_ test: TestWorld, _ page: UInt64, _ body: (UInt64) -> UInt64) throws {
        let word = try word(test, page)
        word.store(body(word.load()))
        test.cpu.dropTranslations()
    }

    @Test func `I-1: a page that is still referenced at rest`() throws {
        let test = try written()
        let kept = Kept()
        test.vm.withSlots { kept.page = test.vm.page(of: GuestFrame(0)) }
        #expect(test.brokenRules() == [.i1])
        kept.drop()
    }

    /// A reference that a test keeps for a while.
    private final class Kept {
        var page: PageReference?
        func drop() {
            if let page = page.take() { page.releaseUnused() }
        }
        func releaseDirtyWithoutLock() {
            if let page = page.take() { page.releaseDirty(stabilisedBy: .pageLock) }
        }
    }

    @Test func `I-1: an owner that is dropped without a release`() throws {
        let test = try written()
        test.vm.withSlots { _ = test.vm.page(of: GuestFrame(0)) }
        #expect(test.brokenRules() == [.i1])
        #expect(test.journal.holdings.isEmpty, "it was put all the same")
    }

    @Test func `I-2: a reference put that nobody held`() throws {
        let test = try written()
        test.journal.record(Event(.referenceDropped, holder: .guestFault, frame: test.frame(0)))
        #expect(test.brokenRules() == [.i2])
    }

    @Test func `I-3: a pin dropped as a reference`() throws {
        let test = try written()
        test.journal.record(Event(.pinTaken, holder: .hostMap, frame: test.frame(0)))
        test.journal.record(Event(.referenceDropped, holder: .hostMap, frame: test.frame(0)))
        #expect(test.brokenRules().contains(.i3))
    }

    @Test func `I-4 and I-5: what the heuristic does`() throws {
        let test = try TestWorld(.countedPFNMap, policy: .guess)
        #expect(test.guest(.write, page: 0, 1) == .stored)
        test.zap(8)
        #expect(test.brokenRules() == [.i4, .i5])
    }

    @Test func `I-6: an entry that maps another frame than the process`() throws {
        let test = try written()
        let other = try #require(test.frame(3))
        try change(test, 0) { $0 & ~0x000f_ffff_ffff_f000 | other.physicalAddress }
        #expect(test.brokenRules() == [.i6])
    }

    @Test func `I-6: an entry left behind when the process unmaps`() throws {
        let test = try written()
        let entry = try #require(test.leaf(0)).entry
        let word = try word(test, 0)
        try test.world.addressSpace.advise(TestWorld.user..<(TestWorld.user + 4096), .dontNeed)
        word.store(entry)
        test.vm.statistics.addPages(level: 1, 1)
        #expect(test.brokenRules() == [.i6])
    }

    @Test func `I-7: a writable entry over a read-only mapping`() throws {
        let test = try TestWorld(.anonymous)
        #expect(test.guest(.read, page: 0) == .value(0))
        #expect(test.brokenRules().isEmpty)
        try change(test, 0) { $0 | 2 | 1 << 57 | 1 << 58 }
        #expect(test.brokenRules().contains(.i7))
    }

    @Test func `I-9: an invalidation that never ends`() throws {
        let test = try written()
        test.vm.invalidateRangeStart(TestWorld.user..<(TestWorld.user + 4096), blockable: true)
        #expect(test.brokenRules() == [.i9])
        test.vm.invalidateRangeEnd(TestWorld.user..<(TestWorld.user + 4096))
    }

    @Test func `I-10: a fault's page released as dirty without the lock`() throws {
        let test = try written()
        let kept = Kept()
        kept.page = test.world.addressSpace.getUserPageFastOnly(TestWorld.user, write: true, holder: .guestFault)
        kept.releaseDirtyWithoutLock()
        #expect(test.brokenRules() == [.i10])
    }

    @Test func `I-11: a writable page that was never marked dirty`() throws {
        let test = try written()
        test.world.host.memory.forgetAccessedAndDirty()
        #expect(test.brokenRules() == [.i11])
    }

    @Test func `I-21: an entry without a slot`() throws {
        let test = try written()
        let leaf = try #require(test.leaf(0))
        let word = try word(test, 0)
        test.zap(8)
        // Beyond the slot's eight pages, in the same table.
        let offset = word.identity - UInt64(UInt(bitPattern: test.arena.base))
        let table = HostFrame(offset >> pageShift)
        test.world.host.memory.entry(100, of: table).store(leaf.entry)
        test.vm.statistics.addPages(level: 1, 1)
        #expect(test.brokenRules() == [.i21])
    }

    @Test func `I-23: a writable entry in a read-only slot`() throws {
        let test = try TestWorld(.anonymous) { $0.slots[0].readOnly = true }
        try test.world.addressSpace.store(TestWorld.user, 1)
        #expect(test.guest(.read, page: 0) == .value(1))
        #expect(test.brokenRules().isEmpty)
        try change(test, 0) { $0 | 2 | 1 << 57 | 1 << 58 }
        #expect(test.brokenRules().contains(.i23))
    }

    @Test func `X11: a translation cached after its entry is gone`() throws {
        let test = try written()
        let word = try word(test, 0)
        word.store(0x8000_0000_0000_0000)
        test.vm.statistics.addPages(level: 1, -1)
        #expect(test.brokenRules() == [.x11])
    }

    @Test func `I-13: a translation cached with a right that is gone`() throws {
        let test = try written()
        _ = try word(test, 0).fetchAnd(~2)
        #expect(test.brokenRules() == [.i13])
    }

    @Test func `X44 and X39: a writable page of a logged slot that is not in the log`() throws {
        let test = try written(.anonymous) { $0.slots[0].logDirtyPages = true }
        _ = try test.vm.getDirtyLog(slot: 0)
        test.cpu.dropTranslations()
        try change(test, 0) { $0 | 2 }
        #expect(test.brokenRules() == [.x44])
    }

    @Test func `X63: a lock taken against the order`() throws {
        let test = try written()
        let inner = SpinLock(.zone)
        let outer = SpinLock(.mnInvalidate)
        inner.lock()
        outer.lock()
        outer.unlock()
        inner.unlock()
        #expect(test.brokenRules() == [.x63])
    }

    @Test func `X63: sleeping under a spinning lock`() throws {
        let test = try written()
        let spin = SpinLock(.mnInvalidate)
        spin.lock()
        mightSleep()
        spin.unlock()
        #expect(test.brokenRules() == [.x63])
    }

    /// Each break of an EPT entry and the rule that must see it. Spec: x86 X18 to X24.
    @Test(
        arguments: [
            (1 << 11, 0, Invariant.x18),  // present without MMU_PRESENT
            (1 << 57, 0, .x19),  // W without host-writable
            (1 << 58, 0, .x19),  // W without MMU-writable
            (0, 1 << 51, .x23),  // an address bit that the host doesn't have
            (1 << 63, 0, .x24),  // #VE not suppressed
        ] as [(UInt64, UInt64, Invariant)])
    func `an EPT entry with a wrong bit`(_ clear: UInt64, _ set: UInt64, _ rule: Invariant) throws {
        let test = try written()
        try change(test, 0) { $0 & ~clear | set }
        #expect(test.brokenRules().contains(rule))
    }

    @Test func `X28: a frozen entry that can be reached`() throws {
        let test = try written()
        try change(test, 0) { _ in 0x8000_0000_0000_05a0 }
        #expect(test.brokenRules().contains(.x28))
    }

    @Test func `X36: a leaf that is not counted`() throws {
        let test = try written()
        test.vm.statistics.addPages(level: 1, 1)
        #expect(test.brokenRules() == [.x36])
    }

    @Test func `I-14: the zero page's flags changed`() throws {
        let test = try written()
        let memory = test.world.host.memory
        memory.page(test.world.host.zeroPage).pointee.flags.bitwiseOr(PageFlags.dirty(.kvm), ordering: .relaxed)
        #expect(test.brokenRules() == [.i14])
    }

    @Test func `I-20: the two sets of slots differ`() throws {
        let test = try written()
        test.vm.slotSets[0].inactive.removeAll()
        #expect(test.brokenRules() == [.i20])
    }

    @Test func `I-28: memory that nobody gives back`() throws {
        let test = try TestWorld(.anonymous)
        #expect(test.world.host.allocateTable(order: 0, fill: 0) != nil)
        #expect(test.world.run().findings.map(\.invariant) == [.i28])
    }

    @Test func `X22: a huge leaf over a frame that is not aligned`() throws {
        let test = try TestWorld(.anonymous, pages: 512) { $0.transparentHugePages = true }
        #expect(test.guest(.write, page: 3, 1) == .stored)
        #expect(test.leaf(3)?.level == .page2M && test.brokenRules().isEmpty)
        try change(test, 3) { $0 + 0x1000 }
        #expect(test.brokenRules().contains(.x22))
    }

    @Test func `X39: a huge writable leaf in a logged slot`() throws {
        let test = try TestWorld(.anonymous, pages: 512) { $0.transparentHugePages = true }
        #expect(test.guest(.write, page: 3, 1) == .stored)
        let entry = try #require(test.leaf(3)).entry
        let word = try word(test, 3)
        test.zap(512)
        try test.vm.setMemoryRegion(
            MemoryRegion(
                slot: 0, flags: SlotFlags(logDirtyPages: true), guestAddress: GuestAddress(0), size: 512 * pageSize,
                userAddress: TestWorld.user))
        word.store(entry)
        test.vm.statistics.addPages(level: 2, 1)
        #expect(test.brokenRules().isSuperset(of: [.x39, .x44]))
    }

    @Test func `X29: a table that two entries point to`() throws {
        let test = try written()
        let word = try word(test, 0)
        let offset = word.identity - UInt64(UInt(bitPattern: test.arena.base))
        let table = HostFrame(offset >> pageShift)
        let memory = test.world.host.memory
        for frame in 1..<UInt64(test.world.plan.ramFrames) {
            guard let state = memory.inspect(HostFrame(frame)), state.flags.bits & PageFlags.table != 0 else {
                continue
            }
            let parent = memory.entry(0, of: HostFrame(frame))
            guard parent.load() & 0x000f_ffff_ffff_f000 == table.physicalAddress else { continue }
            memory.entry(7, of: HostFrame(frame)).store(parent.load())
        }
        #expect(test.brokenRules().contains(.x29))
    }

    /// Each break of a G-stage leaf. Spec: arches RV-1.
    @Test(
        arguments: [
            (0x10, 0, Invariant.rv1),  // no U
            (0x02, 0, .rv1),  // no R
            (0, 1 << 61, .rv1),  // PBMT
            (0, 1 << 63, .rv1),  // N
            (0, 0x100, .rv1),  // RSW
            (0x80, 0, .rv4),  // D cleared
        ] as [(UInt64, UInt64, Invariant)])
    func `a G-stage leaf with a wrong bit`(_ clear: UInt64, _ set: UInt64, _ rule: Invariant) throws {
        let test = try written(.anonymous, .riscvSv39x4)
        try change(test, 0) { $0 & ~clear | set }
        #expect(test.brokenRules().contains(rule))
    }
}
