import Frames
import Testing

@testable import LogConsumers

/// A migration or a chain of snapshots of a VM on paper: slots of 70, 5 and 3 pages.
private struct Setting {
    let guest = PaperGuest()
    let writers = WriterLog()
    let reader: LogReader

    init(_ mistakes: Mistakes, manual: Bool = false, startsFull: Bool = false) {
        guest.isManual = manual
        guest.startsFull = startsFull
        for (id, pages) in [(4, 70), (1, 5), (9, 3)] { guest.add(UInt16(id), pages: UInt64(pages)) }
        for page in 0..<UInt64(5) { guest.write(100 + page, slot: 1, page: page) }
        reader = LogReader(guest, writers, mistakes)
    }
}

/// The image at the stop is memory at the stop; each mistake of the field breaks that, and nothing else does.
@Suite struct LOG1_ImageIsMemory {
    /// What happens in a test, and whether everything was as it should be.
    private static func isRight(_ mistake: Mistake?, _ body: (Mistakes) throws -> PaperGuest) throws -> Bool {
        let guest = try body(mistake.map { Mistakes($0) } ?? Mistakes())
        #expect(guest.stops > 0)
        return guest.wrong.isEmpty
    }

    @Test(arguments: [nil, Mistake.trailingPagesNotSkipped])
    func `clean pages at a slot's end are skipped in the file`(mistake: Mistake?) throws {
        let right = try Self.isRight(mistake) { (mistakes: Mistakes) throws -> PaperGuest in
            let setting = Setting(mistakes)
            let snapshots = Snapshots(setting.reader)
            #expect(try snapshots.full() == 78)
            setting.guest.write(7, slot: 0, page: 2)
            setting.guest.write(8, slot: 1, page: 0)
            #expect(try snapshots.difference() == 2)
            return setting.guest
        }
        #expect(right == (mistake == nil))
    }

    @Test(arguments: [nil, Mistake.secondFromFirst])
    func `a second migration copies everything again`(mistake: Mistake?) throws {
        let right = try Self.isRight(mistake) { (mistakes: Mistakes) throws -> PaperGuest in
            let setting = Setting(mistakes)
            let migration = Migration(setting.reader)
            #expect(try migration.start() == 78)
            #expect(try migration.stop() == 0)
            #expect(setting.guest.wrong.isEmpty)
            _ = try migration.start()
            setting.guest.write(7, slot: 1, page: 1)
            _ = try migration.round()
            _ = try migration.stop()
            return setting.guest
        }
        #expect(right == (mistake == nil))
    }

    @Test(arguments: [nil, Mistake.newSlotTakenForClean])
    func `a slot that appears is copied whole`(mistake: Mistake?) throws {
        let right = try Self.isRight(mistake) { (mistakes: Mistakes) throws -> PaperGuest in
            let setting = Setting(mistakes)
            let migration = Migration(setting.reader)
            _ = try migration.start()
            setting.guest.add(5, pages: 2)
            setting.guest.write(7, slot: 3, page: 1)
            _ = try migration.round()
            setting.guest.write(8, slot: 3, page: 0)
            #expect(try migration.round() == 1)
            _ = try migration.stop()
            return setting.guest
        }
        #expect(right == (mistake == nil))
    }

    /// One write, of page 3 of slot 1, at each moment of `body` in turn. Whether every image was right.
    private static func isRightAtEveryMoment(
        _ mistake: Mistake?, manual: Bool = false, startsFull: Bool = false, _ before: (Migration) throws -> Void,
        _ body: (Migration) throws -> Void
    ) throws -> Bool {
        var (moment, isRight, isLate) = (0, true, false)
        while !isLate {
            let setting = Setting(
                mistake.map { Mistakes($0) } ?? Mistakes(), manual: manual, startsFull: startsFull)
            let migration = Migration(setting.reader)
            try before(migration)
            setting.guest.write(7, slot: 1, page: 3)
            setting.guest.write(7, slot: 1, page: 4)
            var now = 0
            setting.guest.meanwhile = {
                if now == moment { setting.guest.write(1000, slot: 1, page: 3) }
                now += 1
            }
            try body(migration)
            setting.guest.meanwhile = {}
            if migration.isRunning { _ = try migration.stop() }
            if !setting.guest.wrong.isEmpty { isRight = false }
            isLate = moment >= now
            moment += 1
        }
        #expect(moment > 5)
        return isRight
    }

    @Test(arguments: [nil, Mistake.copiedBeforeLogging], [false, true])
    func `logging is on before anything is copied`(mistake: Mistake?, manual: Bool) throws {
        let right = try Self.isRightAtEveryMoment(mistake, manual: manual) { _ in
        } _: {
            _ = try $0.start()
        }
        #expect(right == (mistake == nil))
    }

    @Test func `a log that begins full hides that it was turned on late`() throws {
        let right = try Self.isRightAtEveryMoment(.copiedBeforeLogging, manual: true, startsFull: true) { _ in
        } _: {
            _ = try $0.start()
        }
        #expect(right)
    }

    @Test(arguments: [nil, Mistake.clearedAfterCopy], [false, true])
    func `the log is cleared before the pages are copied`(mistake: Mistake?, startsFull: Bool) throws {
        let right = try Self.isRightAtEveryMoment(mistake, manual: true, startsFull: startsFull) {
            _ = try $0.start()
        } _: {
            _ = try $0.round()
        }
        #expect(right == (mistake == nil))
    }

    @Test(arguments: [nil, Mistake.runsOnAfterHarvest], [false, true])
    func `nothing is written between the last harvest and the stop`(mistake: Mistake?, manual: Bool) throws {
        let right = try Self.isRightAtEveryMoment(mistake, manual: manual) {
            _ = try $0.start()
        } _: {
            _ = try $0.round()
            _ = try $0.stop()
        }
        #expect(right == (mistake == nil))
    }

    @Test(arguments: [nil, Mistake.residentTakenForDirty])
    func `a page on the swap device may be dirty`(mistake: Mistake?) throws {
        let right = try Self.isRight(mistake) { (mistakes: Mistakes) throws -> PaperGuest in
            let setting = Setting(mistakes)
            let snapshots = Snapshots(setting.reader)
            _ = try snapshots.full()
            setting.guest.write(7, slot: 0, page: 66)
            setting.guest.paper[0].resident[66] = false
            _ = try snapshots.difference()
            return setting.guest
        }
        #expect(right == (mistake == nil))
    }

    @Test func `what the VMM marks is copied, and what it does not mark is not`() throws {
        let setting = Setting(Mistakes())
        let migration = Migration(setting.reader)
        _ = try migration.start()
        setting.guest.writeUnseen(7, slot: 0, page: 69)
        setting.writers.mark(69, of: 4)
        #expect(try migration.round() == 1)
        setting.guest.writeUnseen(8, slot: 0, page: 64)
        #expect(try migration.stop() == 0)
        #expect(setting.guest.wrong.map(\.page) == [64])
    }

    @Test func `logging is as it was before when a migration ends`() throws {
        let setting = Setting(Mistakes())
        setting.guest.paper[2].slot.isLogged = true
        let migration = Migration(setting.reader)
        _ = try migration.start()
        #expect(setting.guest.paper.allSatisfy { $0.slot.isLogged })
        _ = try migration.stop()
        #expect(setting.guest.paper.map(\.slot.isLogged) == [false, false, true])
    }

    @Test func `calls out of order are refused`() throws {
        let setting = Setting(Mistakes())
        let migration = Migration(setting.reader)
        #expect(throws: Errno.EINVAL) { _ = try migration.round() }
        #expect(throws: Errno.EINVAL) { _ = try migration.stop() }
        _ = try migration.start()
        #expect(throws: Errno.EBUSY) { _ = try migration.start() }
        let snapshots = Snapshots(setting.reader)
        #expect(throws: Errno.EINVAL) { _ = try snapshots.difference() }
        #expect(throws: Errno.EINVAL) { _ = try snapshots.restore() }
    }

    @Test func `restored memory is that of the last snapshot`() throws {
        let setting = Setting(Mistakes())
        let snapshots = Snapshots(setting.reader)
        _ = try snapshots.full()
        setting.guest.write(7, slot: 0, page: 69)
        setting.guest.write(8, slot: 2, page: 2)
        _ = try snapshots.difference()
        setting.guest.write(9, slot: 2, page: 2)
        _ = try snapshots.difference()
        let wanted = setting.guest.paper.map(\.memory)
        for slot in 0..<3 { setting.guest.write(77, slot: slot, page: 1) }
        setting.guest.write(78, slot: 0, page: 69)
        #expect(try snapshots.restore() == 4)
        #expect(setting.guest.paper.map(\.memory) == wanted)
        // What the restoration wrote is the VMM's own writing: the next snapshot has it.
        _ = try snapshots.difference()
        #expect(setting.guest.wrong.isEmpty)
    }
}
