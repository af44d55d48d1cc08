import Frames

/// Snapshots of one VM: a full one, and differential ones on top of it, each with what was written since the one before.
/// Restored, the full one is applied first, then the others in their order.
public final class Snapshots {
    private let reader: LogReader
    /// The full snapshot and the differential ones since, in their order.
    public private(set) var files: [SnapshotFile] = []

    public init(_ reader: LogReader) { self.reader = reader }

    /// Everything stands still, all is written; logging is on from now on. Returns the pages written.
    public func full() throws(Errno) -> UInt64 {
        files = []
        try reader.end()
        return try take(.whole)
    }

    /// Everything stands still, what was written since the last snapshot is. EINVAL: there is no full one.
    public func difference() throws(Errno) -> UInt64 {
        guard !files.isEmpty else { throw .EINVAL }
        return try take(.added)
    }

    /// Forgets the files; logging goes off where a snapshot has turned it on. Another consumer takes the log.
    public func end() throws(Errno) {
        files = []
        try reader.end()
    }

    /// What the files restore to.
    public func restored() -> MemoryImage {
        let image = MemoryImage()
        for file in files { file.apply(to: image) }
        return image
    }

    /// Brings the guest's memory to what it was at the last snapshot: the full one, then the differential ones. Returns the
    /// pages that were written since, and are written back. EINVAL: there is none. Slots that the files don't have are left
    /// alone.
    public func restore() throws(Errno) -> UInt64 {
        guard !files.isEmpty else { throw .EINVAL }
        let (guest, image) = (reader.guest, restored())
        guest.pause()
        defer { guest.resume() }
        var written: UInt64 = 0
        for slot in guest.slots where image.slots.contains(where: { $0.id == slot.id }) {
            for page in 0..<slot.pages {
                let content = image.content(page, of: slot)
                guard try guest.read(page, of: slot) != content else { continue }
                try guest.write(content, page, of: slot)
                // The next differential snapshot has it again: the write is the VMM's own.
                reader.writers.mark(page, of: slot.id)
                written += 1
            }
        }
        return written
    }

    private func take(_ beginning: LogReader.Beginning) throws(Errno) -> UInt64 {
        let runsOn = reader.mistakes.make(.runsOnAfterHarvest)
        var file: SnapshotFile?
        if runsOn { file = try write(beginning) }
        reader.guest.pause()
        defer { reader.guest.resume() }
        let written = if let file { file } else { try write(beginning) }
        files.append(written)
        reader.guest.stopped(with: restored())
        return UInt64(written.pages.count)
    }

    /// After an error the files are worth nothing: what was taken out of the log is in none.
    private func write(_ beginning: LogReader.Beginning) throws(Errno) -> SnapshotFile {
        var writer = SnapshotWriter()
        do throws(Errno) {
            try reader.harvest(beginning) { (slot, bitmap) throws(Errno) in
                try write(slot, beginning == .whole ? bitmap : dirty(slot, bitmap), &writer)
            }
        } catch {
            files = []
            throw error
        }
        return writer.file
    }

    private func write(_ slot: GuestSlot, _ bitmap: [UInt64], _ writer: inout SnapshotWriter) throws(Errno) {
        writer.begin(slot)
        for page in 0..<slot.pages {
            if bitmap[Int(page / 64)] >> (page % 64) & 1 == 1 {
                writer.write(try reader.guest.read(page, of: slot))
            } else {
                writer.skip()
            }
        }
        writer.end(reader.mistakes)
    }

    /// The pages that a differential snapshot writes: those that the logs name.
    private func dirty(_ slot: GuestSlot, _ bitmap: [UInt64]) -> [UInt64] {
        guard reader.mistakes.make(.residentTakenForDirty) else { return bitmap }
        var resident = [UInt64](repeating: 0, count: slot.words)
        for page in 0..<slot.pages where reader.guest.isResident(page, of: slot) {
            resident[Int(page / 64)] |= 1 << (page % 64)
        }
        return resident
    }
}
