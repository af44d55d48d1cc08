import Frames

/// Pre-copy live migrations of one VM, one after another, each to a new destination: everything is copied while the guest
/// runs, then, in rounds, what was written meanwhile, and the rest when everything stands still.
///
/// States: idle → (`start`) running → (`round`)* → (`stop`) idle. A call that fails ends the migration; logging stays on,
/// and another `start` begins anew.
public final class Migration {
    private let reader: LogReader
    private var hasRun = false
    /// A migration is running.
    public private(set) var isRunning = false
    /// The destination of the running migration, or of the last one.
    public private(set) var image = MemoryImage()

    public init(_ reader: LogReader) { self.reader = reader }

    /// Logging on, everything copied to a new destination. Returns the pages copied. EBUSY: one is running.
    public func start() throws(Errno) -> UInt64 {
        guard !isRunning else { throw .EBUSY }
        image = MemoryImage()
        isRunning = true
        return try copy(hasRun && reader.mistakes.make(.secondFromFirst) ? .named : .whole)
    }

    /// Copies what the logs name, with the guest running. EINVAL: no migration is.
    public func round() throws(Errno) -> UInt64 {
        guard isRunning else { throw .EINVAL }
        return try copy(.added)
    }

    /// Makes everything stand still, copies the rest, and ends: logging off, and the guest runs on (as it does at the
    /// source when the destination does not take over). EINVAL: no migration is running.
    public func stop() throws(Errno) -> UInt64 {
        guard isRunning else { throw .EINVAL }
        let runsOn = reader.mistakes.make(.runsOnAfterHarvest)
        var copied: UInt64 = 0
        if runsOn { copied = try copy(.added) }
        reader.guest.pause()
        defer { reader.guest.resume() }
        if !runsOn { copied = try copy(.added) }
        image.keep(reader.guest.slots)
        reader.guest.stopped(with: image)
        isRunning = false
        hasRun = true
        try reader.end()
        return copied
    }

    private func copy(_ beginning: LogReader.Beginning) throws(Errno) -> UInt64 {
        var copied: UInt64 = 0
        let (guest, image) = (reader.guest, image)
        do throws(Errno) {
            try reader.harvest(beginning) { (slot, bitmap) throws(Errno) in
                image.place(slot.id, pages: slot.pages)
                try forEachPage(in: bitmap) { (page) throws(Errno) in
                    image.set(try guest.read(page, of: slot), page, of: slot.id)
                    copied += 1
                }
            }
        } catch {
            isRunning = false
            throw error
        }
        return copied
    }
}
