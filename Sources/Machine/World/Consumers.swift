import Audit
import Frames
import GuestMemory
import HostMemory
import LogConsumers
import Synchrony

/// Who writes guest memory. The raw value stands in events.
public enum Writer: UInt8, Sendable {
    case guest
    /// The VMM, through its mapping.
    case vmm
    /// A device, by DMA.
    case device
}

/// The users of the dirty log in a world, and who is seen to write its memory. Made only for plans that have such steps:
/// elsewhere nothing waits for `writers`.
final class Consumers {
    // Unsafe: Embedded Swift has no checked `unowned`; the world outlives what it owns.
    unowned(unsafe) let world: World
    /// Shared: the guest runs, a device or the VMM writes. For itself: all of them stand still, or slots change.
    let writers = ReadWriteLock(.writers, spinning: false)
    let log = WriterLog()
    let mistakes = Mistakes()
    let migration: Migration
    let snapshots: Snapshots
    let guest: WorldGuest
    /// Who wrote each guest page last; sorted by page. For what findings say.
    private var lastWriters: [(page: GuestFrame, writer: Writer)] = []

    static func areWanted(by plan: Plan) -> Bool {
        plan.phases.contains { phase in
            phase.tasks.contains { task in
                task.steps.contains { step in
                    switch step.action {
                    case .precopy, .snapshot, .restore: true
                    default: false
                    }
                }
            }
        }
    }

    init(_ world: World) {
        self.world = world
        guest = WorldGuest(world, writers)
        migration = Migration(LogReader(guest, log, mistakes))
        snapshots = Snapshots(LogReader(guest, log, mistakes))
    }

    /// One task at a time. Errors: those of `Migration` and `Snapshots`; EBUSY: a snapshot during a migration.
    func perform(_ action: Action) throws(Errno) -> UInt64 {
        switch action {
        case .precopy(.start):
            // One log, one user: what the migration takes out of it no snapshot finds.
            if !migration.isRunning { try snapshots.end() }
            return try migration.start()
        case .precopy(.round): return try migration.round()
        case .precopy(.stop): return try migration.stop()
        default: break
        }
        guard !migration.isRunning else { throw .EBUSY }
        switch action {
        case .snapshot(.full): return try snapshots.full()
        case .snapshot(.difference): return try snapshots.difference()
        case .restore: return try snapshots.restore()
        default: throw .EINVAL
        }
    }

    // MARK: Writers

    /// Writes memory as the VMM or a device does: `write`, then a mark for each slot that shows `address`.
    func store(by writer: Writer, at address: UserAddress, _ write: () throws(Errno) -> Void) throws(Errno) {
        writers.lockForRead()
        defer { writers.unlockRead() }
        let isMarked = !mistakes.make(writer == .device ? .deviceWritesUnlogged : .ownWritesUnlogged)
        let isEarly = mistakes.make(.markedBeforeWrite)
        if isMarked, isEarly { mark(address) }
        try write()
        noteWrite(by: writer, at: address)
        if isMarked, !isEarly { mark(address) }
    }

    private func mark(_ address: UserAddress) {
        for (slot, page) in pages(at: address) {
            log.mark(page, of: slot.id)
            world.journal.record(Event(.writeMarked, guest: slot.baseFrame.number + page))
        }
    }

    private func pages(at address: UserAddress) -> [(MemorySlot, page: UInt64)] {
        let page = address.page << pageShift
        return world.vm.withSlots {
            var found: [(MemorySlot, page: UInt64)] = []
            for slot in world.vm.activeSlots where !slot.isInvalid {
                let start = slot.userAddress.value
                guard page >= start, page - start < slot.pageCount << pageShift else { continue }
                found.append((slot, (page - start) >> pageShift))
            }
            return found
        }
    }

    func noteWrite(by writer: Writer, at address: UserAddress) {
        let frame = world.addressSpace.translate(address)?.frame
        for (slot, page) in pages(at: address) {
            noteWrite(by: writer, to: GuestFrame(slot.baseFrame.number + page), frame)
        }
    }

    func noteWrite(by writer: Writer, to page: GuestFrame, _ frame: HostFrame?) {
        world.journal.record(
            Event(.memoryWritten, frame: frame, guest: page.number, value: UInt64(writer.rawValue)))
        var index = 0
        while index < lastWriters.count, lastWriters[index].page < page { index += 1 }
        if index < lastWriters.count, lastWriters[index].page == page {
            lastWriters[index].writer = writer
        } else {
            lastWriters.insert((page, writer), at: index)
        }
    }

    /// Nil: nobody was seen to write it.
    func lastWriter(of page: GuestFrame) -> Writer? { lastWriters.first { $0.page == page }?.writer }
}

extension World {
    func useLog(_ action: Action) throws(Errno) -> UInt64 {
        guard let consumers else { throw .EINVAL }
        return try consumers.perform(action)
    }

    /// A write that KVM's log does not see. Without a user of the log nobody keeps another.
    func storeUnseen(_ action: Action) throws(Errno) {
        switch action {
        case .ownStore(let region, let offset, let value):
            let address = address(region, offset)
            guard let consumers else { return try addressSpace.store(address, value) }
            try consumers.store(by: .vmm, at: address) { () throws(Errno) in try addressSpace.store(address, value) }
        case .deviceStore(let region, let offset, let value):
            let address = address(region, offset)
            guard let consumers else { return try deviceStore(address, value) }
            try consumers.store(by: .device, at: address) { () throws(Errno) in try deviceStore(address, value) }
        default: throw .EINVAL
        }
    }

    /// To the frame that was pinned, whatever the process maps there by now. EFAULT: none was: the IOMMU refuses.
    private func deviceStore(_ address: UserAddress, _ value: UInt64) throws(Errno) {
        guard address.value & 7 == 0, let pin = pins.first(where: { $0.address.page == address.page }) else {
            throw .EFAULT
        }
        host.memory.willWrite(pin.frame)
        schedulingNote(.pageUse, pin.frame.physicalAddress)
        host.memory.word(at: pin.frame.physicalAddress | address.offset).storeData(value)
    }

    /// KVM_SET_USER_MEMORY_REGION by a step; where the log has users, with everything standing still, as QEMU does it.
    func setMemoryRegion(_ region: MemoryRegion) throws(Errno) {
        guard let consumers else {
            let begins = region.flags.logDirtyPages && vm.slot(numbered: region.slot)?.isLogged == false
            try vm.setMemoryRegion(region)
            if begins { stepChecks.logBegan(UInt16(truncatingIfNeeded: region.slot)) }
            return
        }
        consumers.writers.lockForWrite()
        defer { consumers.writers.unlockWrite() }
        try vm.setMemoryRegion(region)
        consumers.guest.noteMaking(of: UInt16(truncatingIfNeeded: region.slot))
    }
}
