import Frames

/// The harvest of one consumer: which slots it follows, and which of their pages must be copied now.
///
/// The order that loses nothing, for each slot:
/// 1. Logging is on before any of its pages is copied: what is written from then on is in the log.
/// 2. The log is taken, and its pages protected again, before the pages it names are copied: what is written after the copy
///    is in the next log. In legacy mode GET does both. With manual protection GET only reports, and CLEAR takes exactly
///    what GET has reported; it comes before the copy too.
/// 3. The VMM's own log is taken before the copy as well.
/// 4. The last harvest comes when everything stands still.
public final class LogReader {
    public let guest: LoggedGuest
    public let writers: WriterLog
    public let mistakes: Mistakes

    private struct Followed {
        var slot: GuestSlot
        /// The consumer turned logging on, and turns it off at its end.
        var wasTurnedOn: Bool
    }
    private var followed: [Followed] = []

    public init(_ guest: LoggedGuest, _ writers: WriterLog, _ mistakes: Mistakes = Mistakes()) {
        self.guest = guest
        self.writers = writers
        self.mistakes = mistakes
    }

    /// How a consumer takes slots that it does not follow yet.
    enum Beginning {
        /// Every page is to be copied.
        case whole
        /// The consumer begins, and trusts what the log says. A mistake.
        case named
        /// The consumer has begun before the slot was there.
        case added
    }

    /// Harvests every slot, and hands each to `copy` with a bitmap of the pages that must be copied now. Slots that are gone
    /// are followed no more; what goes during the harvest is left out.
    func harvest(
        _ beginning: Beginning, _ copy: (GuestSlot, [UInt64]) throws(Errno) -> Void
    ) throws(Errno) {
        let slots = guest.slots
        followed.removeAll { old in !slots.contains { old.slot.isSame(as: $0) } }
        for slot in slots {
            do throws(Errno) {
                if followed.contains(where: { $0.slot.isSame(as: slot) }) {
                    try take(slot, everything: false, copy)
                } else {
                    try begin(slot, beginning, copy)
                }
            } catch {
                guard error == .ENOENT, !guest.slots.contains(where: { slot.isSame(as: $0) }) else { throw error }
                followed.removeAll { $0.slot.isSame(as: slot) }
            }
        }
    }

    /// Turns logging off where this consumer has turned it on, and follows nothing more.
    func end() throws(Errno) {
        let slots = guest.slots
        for old in followed where old.wasTurnedOn && slots.contains(where: { old.slot.isSame(as: $0) }) {
            try guest.setLogging(old.slot, false)
        }
        followed = []
    }

    private func begin(
        _ slot: GuestSlot, _ beginning: Beginning, _ copy: (GuestSlot, [UInt64]) throws(Errno) -> Void
    ) throws(Errno) {
        if beginning == .added, mistakes.make(.newSlotTakenForClean) {
            let bitmap = slot.isLogged ? try guest.readLog(slot) : [UInt64](repeating: 0, count: slot.words)
            try follow(slot)
            return try copy(slot, bitmap)
        }
        if mistakes.make(.copiedBeforeLogging) {
            try copy(slot, slot.everyPage)
            return try follow(slot)
        }
        try follow(slot)
        try take(slot, everything: beginning != .named, copy)
    }

    private func follow(_ slot: GuestSlot) throws(Errno) {
        if !slot.isLogged { try guest.setLogging(slot, true) }
        followed.append(Followed(slot: slot, wasTurnedOn: !slot.isLogged))
    }

    private func take(
        _ slot: GuestSlot, everything: Bool, _ copy: (GuestSlot, [UInt64]) throws(Errno) -> Void
    ) throws(Errno) {
        let logged = try guest.readLog(slot)
        let clears = guest.takesByClearing && logged.contains { $0 != 0 }
        let clearsLate = mistakes.make(.clearedAfterCopy)
        if clears, !clearsLate { try guest.clearLog(slot, logged) }
        var bitmap = writers.take(slot)
        for i in bitmap.indices { bitmap[i] |= logged[i] }
        try copy(slot, everything ? slot.everyPage : bitmap)
        if clears, clearsLate { try guest.clearLog(slot, logged) }
    }
}

/// Calls `body` for each bit that is set, ascending.
func forEachPage(in bitmap: [UInt64], _ body: (UInt64) throws(Errno) -> Void) throws(Errno) {
    for i in bitmap.indices {
        var rest = bitmap[i]
        while rest != 0 {
            try body(UInt64(i * 64 + rest.trailingZeroBitCount))
            rest &= rest - 1
        }
    }
}
