import Audit
import Frames
import GuestMemory
import HostMemory
import LogConsumers
import Synchrony

/// The world's VM as a user of its dirty log sees it, and the check that nobody's image is wrong.
final class WorldGuest: LoggedGuest {
    // Unsafe: Embedded Swift has no checked `unowned`; the world outlives what it owns.
    private unowned(unsafe) let world: World
    private let writers: ReadWriteLock
    private var isPaused = false
    /// How often a step has made or changed a slot. Changed with `writers` held for write.
    private var makings: [(id: UInt16, count: UInt64)] = []
    private let makingsIdentity = ObjectIdentity()

    init(_ world: World, _ writers: ReadWriteLock) {
        self.world = world
        self.writers = writers
    }

    /// Caller holds `writers` for write.
    func noteMaking(of id: UInt16) {
        schedulingPoint(.atomicStore, makingsIdentity.value)
        if let index = makings.firstIndex(where: { $0.id == id }) {
            makings[index].count += 1
        } else {
            makings.append((id, 1))
        }
    }

    private func describe(_ slot: MemorySlot) -> GuestSlot {
        schedulingNote(.atomicLoad, makingsIdentity.value)
        let making = makings.first { $0.id == slot.id }?.count ?? 0
        return GuestSlot(id: slot.id, pages: slot.pageCount, isLogged: slot.isLogged, making: making)
    }

    private var present: [MemorySlot] {
        world.vm.withSlots { world.vm.activeSlots.filter { !$0.isInvalid && $0.id != world.tableSlot } }
    }

    override var slots: [GuestSlot] { present.map { describe($0) } }
    override var takesByClearing: Bool { world.vm.manualProtect.enabled }

    private func find(_ slot: GuestSlot) throws(Errno) -> MemorySlot {
        guard let found = present.first(where: { describe($0).isSame(as: slot) }) else { throw .ENOENT }
        return found
    }

    override func setLogging(_ slot: GuestSlot, _ on: Bool) throws(Errno) {
        if !isPaused { writers.lockForWrite() }
        defer { if !isPaused { writers.unlockWrite() } }
        let found = try find(slot)
        var flags = found.flags
        flags.logDirtyPages = on
        try world.vm.setMemoryRegion(
            MemoryRegion(
                slot: UInt32(found.id), flags: flags, guestAddress: found.baseFrame.address,
                size: found.pageCount << pageShift, userAddress: found.userAddress))
    }

    override func readLog(_ slot: GuestSlot) throws(Errno) -> [UInt64] {
        let bitmap = try world.vm.getDirtyLog(slot: UInt32(slot.id))
        // With manual protection nothing is protected yet.
        world.noteHarvest(slot.id, takesByClearing ? [] : world.pages(in: bitmap))
        guard bitmap.count == slot.words else { throw .ENOENT }
        return bitmap
    }

    override func clearLog(_ slot: GuestSlot, _ bitmap: [UInt64]) throws(Errno) {
        do throws(Errno) {
            try world.vm.clearDirtyLog(slot: UInt32(slot.id), firstPage: 0, pages: slot.pages, bitmap: bitmap)
        } catch {
            // Another slot has the id by now.
            throw error == .EINVAL ? .ENOENT : error
        }
        world.noteHarvest(slot.id, world.pages(in: bitmap))
    }

    override func read(_ page: UInt64, of slot: GuestSlot) throws(Errno) -> PageContent {
        let found = try find(slot)
        let content = PageContent(try world.addressSpace.readPage(found.userAddress + page << pageShift))
        world.journal.record(Event(.pageCopied, guest: found.baseFrame.number + page, value: UInt64(slot.id)))
        return content
    }

    override func write(_ content: PageContent, _ page: UInt64, of slot: GuestSlot) throws(Errno) {
        let address = try find(slot).userAddress + page << pageShift
        try world.addressSpace.writePage(address, content.words)
        world.consumers?.noteWrite(by: .vmm, at: address)
    }

    override func isResident(_ page: UInt64, of slot: GuestSlot) -> Bool {
        guard let found = present.first(where: { $0.id == slot.id }) else { return false }
        return world.addressSpace.pageMapEntry(found.userAddress + page << pageShift).isPresent
    }

    override func pause() {
        writers.lockForWrite()
        isPaused = true
        world.journal.record(Event(.writersStopped))
    }

    override func resume() {
        world.journal.record(Event(.writersResumed))
        isPaused = false
        writers.unlockWrite()
    }

    // MARK: The oracle

    /// LOG-1: each page of each slot is in the image as it is in memory now. Nobody writes meanwhile.
    override func stopped(with image: MemoryImage) {
        for slot in present {
            let described = describe(slot)
            for page in 0..<slot.pageCount {
                guard let content = memory(slot.userAddress + page << pageShift),
                    image.content(page, of: described) != content
                else { continue }
                let frame = GuestFrame(slot.baseFrame.number + page)
                world.journal.add(
                    Finding(
                        .log1, reason(world.consumers?.lastWriter(of: frame)),
                        frame: world.addressSpace.translate(slot.userAddress + page << pageShift)?.frame, guest: frame,
                        place: SlotPlace(slot: slot.id, page: page)))
            }
        }
    }

    private func reason(_ writer: Writer?) -> StaticReason {
        switch writer {
        case .guest: "the image has not what the guest wrote last"
        case .vmm: "the image has not what the VMM wrote last"
        case .device: "the image has not what a device wrote last"
        case nil: "the image has not what memory holds, and nobody was seen to write it"
        }
    }

    /// What memory holds: where the process maps a page its bytes, unannounced, since everything stands still; else what a
    /// load brings there. Nil: it can't be read, and no image can have it.
    private func memory(_ address: UserAddress) -> PageContent? {
        if let frame = world.addressSpace.translate(address)?.frame {
            let first = world.host.memory.word(at: frame.physicalAddress)
            return PageContent((0..<PageContent.wordCount).map { first.following($0).peek() })
        }
        do throws(Errno) {
            return PageContent(try world.addressSpace.readPage(address))
        } catch {
            return nil
        }
    }
}
