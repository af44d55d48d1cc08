import Audit
import Frames
import Machine
import Synchrony
import Testing

@testable import GuestMemory
@testable import HostMemory

extension TestGuest {
    func manual(initiallySet: Bool = false) throws {
        var flags = ManualProtect()
        flags.enabled = true
        flags.initiallySet = initiallySet
        try vm.setManualProtect(flags)
    }

    /// GET, as page numbers.
    func log() throws -> [Int] { try vm.getDirtyLog(slot: 0).pages }

    func clear(_ pages: Range<Int>) throws {
        var mask = [UInt64](repeating: 0, count: 4)
        for page in pages { mask[page / 64] |= 1 << UInt64(page % 64) }
        try vm.clearDirtyLog(slot: 0, firstPage: 0, pages: vm.activeSlots[0].pageCount, bitmap: mask)
    }
}

/// `mark_page_dirty_in_slot`.
@Suite struct G2_19_MarkDirty {
    @Test func `only a logged slot has a log, and a bit is a page of the slot`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 140)
        try guest.setSlot(0, guest: 3, pages: 130)
        let plain = guest.vm.activeSlots[0]
        guest.vm.markDirty(gfn(3), in: plain)
        #expect(throws: Errno.ENOENT) { try guest.log() }
        try guest.setSlot(0, guest: 3, pages: 130, log: true)
        let logged = guest.vm.activeSlots[0]
        for page in [3, 66, 67, 132] { guest.vm.markDirty(gfn(page), in: logged) }
        #expect(try guest.vm.getDirtyLog(slot: 0).count == 3, "rounded up to words")
        for page in [3, 66, 67, 132] { guest.vm.markDirty(gfn(page), in: logged) }
        #expect(try guest.log() == [0, 63, 64, 129])
        #expect(try guest.log() == [])
    }

    @Test func `the log of KVM and the state of the page are two things`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1, log: true)
        try guest.space.store(at(0), 1)
        let frame = try #require(guest.frame(0))
        guest.vm.markDirty(gfn(0), in: guest.vm.activeSlots[0])
        #expect(!guest.test.state(frame).flags.isDirty(by: .kvm))
        guest.store(0, 1)
        _ = try guest.log()
        #expect(guest.test.state(frame).flags.isDirty(by: .kvm), "marked once, when the entry was made")
        let marks = guest.test.events(.markedDirty).count
        guest.store(0, 2)
        _ = try guest.log()
        #expect(guest.test.events(.markedDirty).count == marks, "not by logging")
    }

    @Test func `it may be called under any lock`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1, log: true)
        let guardian = guest.vm.lockMMU()
        guest.vm.markDirty(gfn(0), in: guest.vm.activeSlots[0])
        guardian.unlock()
        #expect(try guest.log() == [0])
    }
}

/// The capability and GET.
@Suite struct G5_3_GetDirtyLog {
    @Test func `initially-set needs enabled`() {
        let guest = TestGuest()
        var flags = ManualProtect()
        flags.initiallySet = true
        #expect(throws: Errno.EINVAL) { try guest.vm.setManualProtect(flags) }
        #expect(guest.vm.manualProtect == ManualProtect())
    }

    @Test func `a bad id is EINVAL, no slot or no log ENOENT`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        for id in [UInt32(32764), 0xffff, 1 << 16] {
            #expect(throws: Errno.EINVAL) { try guest.vm.getDirtyLog(slot: id) }
            #expect(throws: Errno.EINVAL) { try guest.vm.clearDirtyLog(slot: id, firstPage: 0, pages: 0, bitmap: []) }
        }
        for id in [UInt32(0), 1, 32763] {
            #expect(throws: Errno.ENOENT) { try guest.vm.getDirtyLog(slot: id) }
            #expect(throws: Errno.ENOENT) { try guest.vm.clearDirtyLog(slot: id, firstPage: 0, pages: 0, bitmap: []) }
        }
    }

    @Test(arguments: Architecture.twoStage)
    func `legacy GET takes the bits and protects: the next write is in the next log`(
        architecture: Architecture
    ) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 4, log: true)
        for page in 0..<3 { guest.store(page, 1) }
        #expect(try guest.log() == [0, 1, 2])
        #expect((0..<3).allSatisfy { guest.leaf($0)?.writable == false })
        #expect(try guest.log() == [])
        guest.store(1, 2)
        #expect(guest.leaf(1)?.writable == true && guest.leaf(0)?.writable == false)
        guest.check()
        #expect(try guest.log() == [1])
    }

    @Test(arguments: Architecture.twoStage)
    func `manual GET only looks`(architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        try guest.manual()
        try guest.addMemory(0, 4, log: true)
        guest.store(1, 1)
        let flushes = guest.test.events(.flush).count
        for _ in 0..<2 { #expect(try guest.log() == [1]) }
        #expect(guest.leaf(1)?.writable == true && guest.test.events(.flush).count == flushes)
        try guest.clear(1..<2)
        #expect(try guest.log() == [] && guest.leaf(1)?.writable == false)
        guest.store(1, 2)
        #expect(try guest.log() == [1])
        guest.check()
    }

    @Test(arguments: Architecture.twoStage)
    func `an initially set log reports all pages of the slot, and protects only at CLEAR`(
        architecture: Architecture
    ) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 70)
        for page in 0..<3 { guest.store(page, 1) }
        try guest.manual(initiallySet: true)
        try guest.setSlot(pages: 70, log: true)
        #expect(guest.leaf(0)?.writable == true)
        #expect(try guest.log() == Array(0..<70))
        try guest.clear(1..<70)
        #expect(guest.leaf(0)?.writable == true && guest.leaf(1)?.writable == false)
        guest.store(0, 2)
        guest.store(2, 2)
        #expect(try guest.log() == [0, 2])
        guest.check()
    }

    @Test(arguments: Architecture.twoStage)
    func `an initially set log of huge leaves loses nothing`(architecture: Architecture) throws {
        let guest = TestGuest(architecture, ramFrames: 4096, thp: true)
        try guest.addMemory(0, 512)
        for page in 0..<512 { guest.store(page, 1) }
        #expect(guest.leaf(0)?.level == .page2M)
        try guest.manual(initiallySet: true)
        try guest.setSlot(pages: 512, log: true)
        try guest.vm.clearDirtyLog(slot: 0, firstPage: 64, pages: 64, bitmap: [~0])
        for page in [3, 70, 400] { guest.store(page, 2) }
        #expect(try Set(guest.log()) == Set(0..<512).subtracting(64..<128).union([70]))
        try guest.vm.clearDirtyLog(slot: 0, firstPage: 0, pages: 512, bitmap: [UInt64](repeating: ~0, count: 8))
        for page in [3, 70, 400] { guest.store(page, 3) }
        #expect(try guest.log() == [3, 70, 400])
        guest.check()
    }

    @Test(arguments: Architecture.twoStage)
    func `turning the log on protects, turning it off gives write access back and forgets`(
        architecture: Architecture
    ) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 2)
        for page in 0..<2 { guest.store(page, 1) }
        try guest.setSlot(pages: 2, log: true)
        #expect(try guest.log() == [], "what was written before is not in the log")
        guest.store(0, 2)
        try guest.setSlot(pages: 2)
        #expect(throws: Errno.ENOENT) { try guest.log() }
        guest.store(1, 3)
        #expect(guest.leaf(1)?.writable == true)
        try guest.setSlot(pages: 2, log: true)
        #expect(try guest.log() == [], "a new log")
        guest.check()
    }

    @Test(arguments: Architecture.twoStage)
    func `a read-only slot has an empty log`(architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 2, log: true, readOnly: true)
        try guest.space.store(at(0), 4)
        #expect(guest.load(0) == .value(4) && guest.store(0, 5) == .mmio)
        #expect(try guest.log() == [])
        guest.check()
    }
}

/// CLEAR, its checks in order.
@Suite struct G5_4_ClearDirtyLog {
    private func answer(
        _ guest: TestGuest, _ first: UInt64, _ pages: UInt64, words: Int, slot: UInt32 = 0
    ) -> Errno? {
        do throws(Errno) {
            try guest.vm.clearDirtyLog(
                slot: slot, firstPage: first, pages: pages, bitmap: [UInt64](repeating: 0, count: words))
            return nil
        } catch { return error }
    }

    @Test func `rows 2 to 6`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 200, log: true)
        #expect(answer(guest, 1, 64, words: 1, slot: 1 << 16) == .EINVAL)
        #expect(answer(guest, 1, 64, words: 1, slot: 9) == .EINVAL, "3 goes before 4")
        #expect(answer(guest, 0, 64, words: 1, slot: 9) == .ENOENT)
        for (first, pages, errno) in [
            (UInt64(1), UInt64(64), Errno.EINVAL), (63, 137, .EINVAL), (256, 0, .EINVAL), (0, 201, .EINVAL),
            (128, 73, .EINVAL), (0, 63, .EINVAL), (64, 65, .EINVAL), (0, .max, .EINVAL),
        ] { #expect(answer(guest, first, pages, words: 4) == errno, "\(first) \(pages)") }
        for (first, pages) in [(UInt64(0), UInt64(0)), (0, 64), (64, 64), (0, 200), (128, 72), (192, 8), (192, 0)] {
            #expect(answer(guest, first, pages, words: 4) == nil, "\(first) \(pages)")
        }
        #expect(answer(guest, 0, 200, words: 3) == .EFAULT, "the bitmap is too short")
        #expect(answer(guest, 0, 201, words: 0) == .EINVAL, "5 goes before 6")
    }

    @Test func `only bits that were set are protected again, and the mask begins at the first page`() throws {
        let guest = TestGuest()
        try guest.manual()
        try guest.addMemory(0, 130, log: true)
        for page in [1, 65, 66, 129] { guest.store(page, 1) }
        try guest.vm.clearDirtyLog(slot: 0, firstPage: 64, pages: 64, bitmap: [0b110])
        #expect(try guest.log() == [1, 66, 129].filter { $0 != 66 }, "bits 1 and 2 are pages 65 and 66")
        #expect(guest.leaf(65)?.writable == false && guest.leaf(1)?.writable == true)
        let flushes = guest.test.events(.flush).count
        try guest.vm.clearDirtyLog(slot: 0, firstPage: 64, pages: 64, bitmap: [~0])
        #expect(guest.test.events(.flush).count == flushes, "nothing was set: nothing is flushed")
        try guest.vm.clearDirtyLog(slot: 0, firstPage: 128, pages: 2, bitmap: [~0])
        #expect(try guest.log() == [1], "bits beyond the slot are ignored")
        #expect(guest.leaf(129)?.writable == false)
    }

    @Test func `it works without the capability`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 64, log: true)
        guest.store(3, 1)
        try guest.clear(0..<64)
        #expect(try guest.log() == [])
        guest.store(3, 2)
        #expect(try guest.log() == [3])
    }
}

/// I-12, X47: a write between two harvests is in the log.
@Suite struct I12_NoWriteIsLost {
    /// One harvest, with a guest's write at every point at which another thread could run.
    @Test(arguments: Architecture.twoStage, [true, false])
    func `a write in the middle of a harvest is in this report or the next`(
        architecture: Architecture, legacy: Bool
    ) throws {
        var point = 0
        while true {
            let guest = TestGuest(architecture)
            if !legacy { try guest.manual() }
            try guest.addMemory(0, 2, log: true)
            guest.store(0, 1)
            let interposer = Interposer(point) { #expect(guest.store(0, 2) == .stored) }
            interposer.ignoring(.slots)
            var report = try interposer.run {
                if legacy { return try guest.log() }
                let seen = try guest.log()
                try guest.clear(0..<2)
                return seen
            }
            guard interposer.hasFired else { break }
            report += try guest.log()
            #expect(report.contains(0))
            guest.check()
            guest.store(0, 3)
            #expect(try guest.log().contains(0), "point \(point)")
            point += 1
        }
        #expect(point > 2)
    }

    @Test(arguments: [UInt64(5), 77, 4096], Architecture.twoStage)
    func `random writes, harvests and host events lose nothing`(seed: UInt64, architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 100, log: true)
        var random = TestRandom(seed: seed)
        var written: Set<Int> = []
        var children: [AddressSpace] = []
        defer { for child in children { child.exit() } }
        for round in 0..<600 {
            let page = Int.random(in: 0..<100, using: &random)
            switch Int.random(in: 0..<12, using: &random) {
            case 0:
                let report = Set(try guest.log())
                #expect(report.isSuperset(of: written), "seed \(seed): \(written.subtracting(report))")
                written = []
            case 1: try guest.space.advise(pages(page..<(page + 1)), .dontNeed)
            case 2 where children.count < 4: children.append(try guest.space.fork())
            case 3: _ = guest.load(page)
            case 4:
                let mask = [
                    UInt64.random(in: 0 ... .max, using: &random), UInt64.random(in: 0 ... .max, using: &random),
                ]
                try guest.vm.clearDirtyLog(slot: 0, firstPage: 0, pages: 100, bitmap: mask)
                for page in written where mask[page / 64] >> UInt64(page % 64) & 1 == 1 { written.remove(page) }
            case 5 where round % 3 == 0:
                try guest.setSlot(pages: 100)
                try guest.setSlot(pages: 100, log: true)
                written = []
            default:
                #expect(guest.store(page, UInt64(round)) == .stored)
                written.insert(page)
            }
        }
        guest.check()
    }

    @Test func `a page that KVM mapped for itself is logged when it is unmapped, also if logging began meanwhile`()
        throws
    {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        var map: HostMap? = try guest.vm.map(gfn(0))
        try guest.setSlot(pages: 1, log: true)
        #expect(try guest.log() == [])
        map?.bytes.storeBytes(of: 9, as: UInt64.self)
        map.take()?.unmap()
        #expect(try guest.log() == [0])
    }
}
