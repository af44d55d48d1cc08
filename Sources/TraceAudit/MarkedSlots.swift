/// A memslot as the marks declare it. Frames are 4 KiB.
struct MarkedSlot {
    var id: UInt64
    var flags: UInt64
    var firstFrame: UInt64
    var frameCount: UInt64
    var hostAddress: UInt64
    /// Line from which the dirty log has to hold every write; nil without logging.
    var loggedSince: UInt64?
    /// Finished marked runs that wrote since then.
    var loggedRuns: [LoggedRun] = []

    /// `KVM_MEM_LOG_DIRTY_PAGES`.
    var isLogged: Bool { flags & 1 != 0 }
    var frames: ClosedRange<UInt64> { firstFrame...(firstFrame + (frameCount - 1)) }

    init?(_ request: SlotRequest) {
        guard request.size >= 4096, request.size % 4096 == 0, request.guestAddress % 4096 == 0,
            request.guestAddress.addingReportingOverflow(request.size).overflow == false,
            request.hostAddress.addingReportingOverflow(request.size).overflow == false
        else { return nil }
        id = request.slot
        flags = request.flags
        firstFrame = request.guestAddress >> 12
        frameCount = request.size >> 12
        hostAddress = request.hostAddress
    }

    func hasSamePlace(as other: MarkedSlot) -> Bool {
        firstFrame == other.firstFrame && frameCount == other.frameCount && hostAddress == other.hostAddress
    }

    /// Guest frames whose host addresses lie in `range`, partly covered ones included.
    func frames(in range: HostRange) -> ClosedRange<UInt64>? {
        let end = hostAddress + frameCount << 12
        let low = max(range.start, hostAddress)
        let high = min(range.end, end)
        guard low < high else { return nil }
        return (firstFrame + (low - hostAddress) >> 12)...(firstFrame + (high - 1 - hostAddress) >> 12)
    }
}

/// One finished marked run that wrote into a logged slot.
struct LoggedRun {
    var startLine: UInt64
    var doneLine: UInt64
    var frames: ClosedRange<UInt64>
    /// Distinct frames written.
    var count: UInt64
}

/// The slots that the marks have declared so far, by id.
struct MarkedSlots {
    private(set) var slots: [MarkedSlot] = []

    var isEmpty: Bool { slots.isEmpty }

    var hasLog: Bool { slots.contains { $0.loggedSince != nil } }

    func slot(holding frame: UInt64) -> MarkedSlot? { slots.first { $0.frames.contains(frame) } }

    func slot(id: UInt64) -> MarkedSlot? { slots.first { $0.id == id } }

    func frames(in range: HostRange) -> [ClosedRange<UInt64>] { slots.compactMap { $0.frames(in: range) } }

    mutating func replace(id: UInt64, with slot: MarkedSlot?) {
        slots.removeAll { $0.id == id }
        guard let slot, slots.count < 4096 else { return }
        slots.append(slot)
        slots.sort { $0.id < $1.id }
    }

    mutating func update(id: UInt64, _ change: (inout MarkedSlot) -> Void) {
        guard let index = slots.firstIndex(where: { $0.id == id }) else { return }
        change(&slots[index])
    }

    mutating func updateAll(_ change: (inout MarkedSlot) -> Void) {
        for index in slots.indices { change(&slots[index]) }
    }
}
