import Frames
import Testing

@testable import GuestMemory
@testable import HostMemory

/// What the types of an entry can't hold traps: they are told bits, and bits could spell a frame.
@Suite struct I7_EntriesTrap {
    @Test func `an update changes what is not the frame`() {
        let (found, entry) = withEntry(0x5007) {
            ($0.apply(EntryUpdate(set: 0x100, clear: 2), expected: 0x5007), $0.load())
        }
        #expect(found == nil)
        #expect(entry == 0x5105)
    }

    @Test func `an update that sets a bit of the frame traps`() async {
        let trap = await #expect(processExitsWith: .failure, observing: [\.standardErrorContent]) {
            withEntry(0x5007) { _ = $0.apply(EntryUpdate(set: 0x1000), expected: 0x5007) }
        }
        expect(trap, says: "an update may not spell a frame")
    }

    @Test func `an update that clears a bit of the frame traps`() async {
        let trap = await #expect(processExitsWith: .failure, observing: [\.standardErrorContent]) {
            withEntry(0x5007) { _ = $0.apply(EntryUpdate(clear: 1 << 51), expected: 0x5007) }
        }
        expect(trap, says: "an update may not spell a frame")
    }

    @Test func `setting and clearing bits leaves the frame alone`() {
        let set = withEntry(0x5001) { ($0.set(bits: 0xf006), $0.load()) }
        #expect(set == (0x5001, 0x5007))
        let cleared = withEntry(0x5007) { ($0.clear(bits: 0xf002), $0.load()) }
        #expect(cleared == (0x5007, 0x5005))
        let emptied = withEntry(0x5007) { ($0.exchange(forEmpty: 0xf000_0000_0000_f800), $0.load()) }
        #expect(emptied == (0x5007, 0xf000_0000_0000_0800))
    }

    @Test func `the parts of a split are those of the huge leaf`() {
        for index in [0, 1, 511] {
            let part = withEntry { entry in
                entry.storePart(
                    of: ObservedEntry(0x40_0087), index: index, childLevel: .page4K, EntryUpdate(clear: 0x80))
                return entry.load()
            }
            #expect(part == 0x40_0007 + UInt64(index) * 0x1000)
        }
    }

    @Test func `a part beyond the huge leaf traps`() async {
        let trap = await #expect(processExitsWith: .failure, observing: [\.standardErrorContent]) {
            withEntry {
                $0.storePart(of: ObservedEntry(0x40_0087), index: 512, childLevel: .page4K, EntryUpdate())
            }
        }
        expect(trap, says: "not a part of the huge leaf")
    }

    @Test func `a part of another size than the huge leaf's traps`() async {
        let trap = await #expect(processExitsWith: .failure, observing: [\.standardErrorContent]) {
            withEntry {
                $0.storePart(of: ObservedEntry(0x40_0087), index: 1, childLevel: .page2M, EntryUpdate())
            }
        }
        expect(trap, says: "not a part of the huge leaf")
    }

    @Test func `a split that spells a frame traps`() async {
        let trap = await #expect(processExitsWith: .failure, observing: [\.standardErrorContent]) {
            withEntry {
                $0.storePart(of: ObservedEntry(0x40_0087), index: 0, childLevel: .page4K, EntryUpdate(set: 0x1000))
            }
        }
        expect(trap, says: "an update may not spell a frame")
    }

    @Test func `a join maps what its leaves mapped`() {
        let (found, entry) = withEntry(0x9003) {
            (
                $0.replaceTable(
                    byJoining: ObservedEntry(0x40_3007), level: .page2M, EntryUpdate(set: 0x80), expected: 0x9003),
                $0.load()
            )
        }
        #expect(found == nil)
        #expect(entry == 0x40_0087)
    }

    @Test func `a join that spells a frame traps`() async {
        let trap = await #expect(processExitsWith: .failure, observing: [\.standardErrorContent]) {
            withEntry(0x9003) {
                _ = $0.replaceTable(
                    byJoining: ObservedEntry(0x40_3007), level: .page2M, EntryUpdate(set: 0x1000), expected: 0x9003)
            }
        }
        expect(trap, says: "an update may not spell a frame")
    }

    @Test func `rights that overlap the frame number trap`() async {
        let trap = await #expect(processExitsWith: .failure, observing: [\.standardErrorContent]) {
            _ = FrameField(mask: 0xf000, shift: 12, write: 0x1000)
        }
        expect(trap, says: "share a bit")
    }
}

/// A permit says which frame, how large a leaf and which rights; installing anything else traps.
@Suite struct I6_PermitsTrap {
    @Test func `what the permit says is installed`() {
        let small = withEntry { (install(permit(), in: $0), $0.load()) }
        #expect(small == (0, 0x40_3007))
        let huge = withEntry { (install(permit(largest: .page2M), .page2M, in: $0), $0.load()) }
        #expect(huge == (0, 0x40_0007))
        let readOnly = withEntry { (install(permit(writable: false), rights: 5, in: $0), $0.load()) }
        #expect(readOnly == (0, 0x40_3005))
        let raced = withEntry(0x8007) {
            ($0.install(permit(), level: .page4K, attributes: 7, expected: 0), $0.load())
        }
        #expect(raced == (0x8007, 0x8007))
    }

    @Test func `attributes that spell a frame trap`() async {
        let trap = await #expect(processExitsWith: .failure, observing: [\.standardErrorContent]) {
            withEntry { _ = install(permit(), rights: 0x1007, in: $0) }
        }
        expect(trap, says: "attributes may not spell a frame")
    }

    @Test func `a leaf larger than the permit traps`() async {
        let trap = await #expect(processExitsWith: .failure, observing: [\.standardErrorContent]) {
            withEntry { _ = install(permit(), .page2M, in: $0) }
        }
        expect(trap, says: "the permit does not allow a leaf of this level")
    }

    @Test func `a writable leaf for a mapping that may only be read traps`() async {
        let trap = await #expect(processExitsWith: .failure, observing: [\.standardErrorContent]) {
            withEntry { _ = install(permit(writable: false), in: $0) }
        }
        expect(trap, says: "the permit does not allow writing")
    }

    @Test func `a huge leaf for frames that do not lie alike traps`() async {
        let trap = await #expect(processExitsWith: .failure, observing: [\.standardErrorContent]) {
            let permit = InstallPermit(
                guestFrame: GuestFrame(0x204), frame: HostFrame(0x403), largest: .page2M, writable: true, counted: true)
            withEntry { _ = install(permit, .page2M, in: $0) }
        }
        expect(trap, says: "guest and host are not congruent")
    }

    @Test func `a link whose attributes spell a frame traps`() async {
        let trap = await #expect(processExitsWith: .failure, observing: [\.standardErrorContent]) {
            let small = SmallMemory()
            let host = Host(memory: small.memory, transparentHugePages: false)
            let table = host.table(host.allocateTable(order: 0, fill: 0)!)
            withEntry { _ = $0.link(table, attributes: 0x1007, expected: 0) }
        }
        expect(trap, says: "attributes may not spell a frame")
    }

    @Test func `a page table is linked`() {
        let small = SmallMemory()
        let host = Host(memory: small.memory, transparentHugePages: false)
        let frame = host.allocateTable(order: 0, fill: 0)!
        let linked = withEntry { ($0.link(host.table(frame), attributes: 7, expected: 0), $0.load()) }
        #expect(linked.0 == nil)
        #expect(linked.1 == frame.physicalAddress | 7)
        host.freeTable(frame)
    }

    @Test func `a page that is no table traps on its way into a link`() async {
        let trap = await #expect(processExitsWith: .failure, observing: [\.standardErrorContent]) {
            let small = SmallMemory()
            let host = Host(memory: small.memory, transparentHugePages: false)
            _ = host.table(small.memory.allocatePages(order: 0)!)
        }
        expect(trap, says: "not a page table")
    }
}

/// What the process said when it trapped. An optimised build says nothing.
func expect(_ trap: ExitTest.Result?, says reason: String, sourceLocation: SourceLocation = #_sourceLocation) {
    #if DEBUG
        let said = String(decoding: trap?.standardErrorContent ?? [], as: UTF8.self)
        #expect(said.contains(reason), "it said: \(said)", sourceLocation: sourceLocation)
    #endif
}

@_lifetime(immortal)
private func permit(largest: PageLevel = .page4K, writable: Bool = true) -> InstallPermit {
    InstallPermit(
        guestFrame: GuestFrame(0x203), frame: HostFrame(0x403), largest: largest, writable: writable, counted: true)
}

private func install(
    _ permit: borrowing InstallPermit, _ level: PageLevel = .page4K, rights: UInt64 = 7, in entry: StageTwoEntry
) -> UInt64 { entry.install(permit, level: level, attributes: rights) }
