import Frames
import Testing

@testable import LogConsumers

/// A VM on paper: memory, and a dirty log that is always right, legacy or manual. Between any two calls of a consumer
/// `meanwhile` runs, unless everything stands still: there the guest and the VMM write.
final class PaperGuest: LoggedGuest {
    struct Slot {
        var slot: GuestSlot
        var memory: [PageContent]
        var dirty: [Bool]
        var resident: [Bool]
    }
    var paper: [Slot] = []
    var isManual = false
    var startsFull = false
    private(set) var isPaused = false
    /// Slots and pages in which an image differed from memory at a stop.
    private(set) var wrong: [(slot: UInt16, page: UInt64)] = []
    private(set) var stops = 0
    private var makings: UInt64 = 0
    var meanwhile: () -> Void = {}
    /// Writers come to an end of what they are doing before they stand still.
    var beforePause: () -> Void = {}

    func add(_ id: UInt16, pages: UInt64, isLogged: Bool = false) {
        makings += 1
        let making = makings
        let count = Int(pages)
        paper.append(
            Slot(
                slot: GuestSlot(id: id, pages: pages, isLogged: isLogged, making: making),
                memory: [PageContent](repeating: PageContent(), count: count),
                dirty: [Bool](repeating: isLogged && isManual && startsFull, count: count),
                resident: [Bool](repeating: true, count: count)))
    }

    static func content(_ value: UInt64) -> PageContent {
        var words = [UInt64](repeating: 0, count: PageContent.wordCount)
        words[Int(value % 512)] = value
        return PageContent(words)
    }

    /// The guest writes; KVM logs it.
    func write(_ value: UInt64, slot: Int, page: UInt64) {
        precondition(!isPaused)
        paper[slot].memory[Int(page)] = Self.content(value)
        paper[slot].resident[Int(page)] = true
        if paper[slot].slot.isLogged { paper[slot].dirty[Int(page)] = true }
    }

    /// The VMM or a device writes; KVM does not hear of it.
    func writeUnseen(_ value: UInt64, slot: Int, page: UInt64) {
        precondition(!isPaused)
        paper[slot].memory[Int(page)] = Self.content(value)
        paper[slot].resident[Int(page)] = true
    }

    private func pass() { if !isPaused { meanwhile() } }

    private func index(_ slot: GuestSlot) throws(Errno) -> Int {
        guard let index = paper.firstIndex(where: { $0.slot.isSame(as: slot) }) else { throw .ENOENT }
        return index
    }

    override var slots: [GuestSlot] { paper.map(\.slot) }
    override var takesByClearing: Bool { isManual }

    override func setLogging(_ slot: GuestSlot, _ on: Bool) throws(Errno) {
        pass()
        let i = try index(slot)
        if on != paper[i].slot.isLogged {
            for page in paper[i].dirty.indices { paper[i].dirty[page] = on && isManual && startsFull }
        }
        paper[i].slot.isLogged = on
        pass()
    }

    override func readLog(_ slot: GuestSlot) throws(Errno) -> [UInt64] {
        pass()
        let i = try index(slot)
        guard paper[i].slot.isLogged else { throw .ENOENT }
        var bitmap = [UInt64](repeating: 0, count: slot.words)
        for page in paper[i].dirty.indices where paper[i].dirty[page] {
            bitmap[page / 64] |= 1 << UInt64(page % 64)
            if !isManual { paper[i].dirty[page] = false }
        }
        pass()
        return bitmap
    }

    override func clearLog(_ slot: GuestSlot, _ bitmap: [UInt64]) throws(Errno) {
        pass()
        let i = try index(slot)
        guard paper[i].slot.isLogged else { throw .ENOENT }
        try forEachPage(in: bitmap) { (page) throws(Errno) in paper[i].dirty[Int(page)] = false }
        pass()
    }

    override func read(_ page: UInt64, of slot: GuestSlot) throws(Errno) -> PageContent {
        pass()
        defer { pass() }
        return paper[try index(slot)].memory[Int(page)]
    }

    override func write(_ content: PageContent, _ page: UInt64, of slot: GuestSlot) throws(Errno) {
        paper[try index(slot)].memory[Int(page)] = content
    }

    override func isResident(_ page: UInt64, of slot: GuestSlot) -> Bool {
        paper.first { $0.slot.isSame(as: slot) }?.resident[Int(page)] ?? false
    }

    override func pause() {
        beforePause()
        isPaused = true
    }
    override func resume() { isPaused = false }

    override func stopped(with image: MemoryImage) {
        #expect(isPaused)
        stops += 1
        for slot in paper {
            for page in 0..<slot.slot.pages where image.content(page, of: slot.slot) != slot.memory[Int(page)] {
                wrong.append((slot.slot.id, page))
            }
        }
    }
}
