import Frames

/// A broken rule: which, on which page, and where in the journal.
public struct Finding: Sendable, Equatable {
    public var invariant: Invariant
    /// What is wrong, in words.
    public var reason: StaticReason
    /// Host frame number or `Event.none`.
    public var frame: UInt64
    /// Guest frame number or `Event.none`.
    public var guest: UInt64
    /// Index of the event in the journal at which it was seen; the journal's length for checks at rest.
    public var event: Int
    /// The driver that is to blame, by its name; nil if it is the core.
    public var driver: StaticReason?
    /// The page of a slot that the finding is about, where that says more than the frame.
    public var place: SlotPlace?

    public init(
        _ invariant: Invariant, _ reason: StaticReason, frame: HostFrame? = nil, guest: GuestFrame? = nil,
        event: Int = 0, driver: StaticReason? = nil, place: SlotPlace? = nil
    ) {
        self.invariant = invariant
        self.reason = reason
        self.frame = frame?.number ?? Event.none
        self.guest = guest?.number ?? Event.none
        self.event = event
        self.driver = driver
        self.place = place
    }
}

/// A page of a memslot.
public struct SlotPlace: Sendable, Equatable {
    public var slot: UInt16
    /// From the slot's start.
    public var page: UInt64
    public init(slot: UInt16, page: UInt64) {
        self.slot = slot
        self.page = page
    }
}

/// A literal text that compares by its bytes, so that findings are `Equatable` without `String` in the core.
public struct StaticReason: ExpressibleByStringLiteral, Sendable, Equatable {
    public let text: StaticString
    public init(_ text: StaticString) { self.text = text }
    public init(stringLiteral value: StaticString) { text = value }
    public static func == (a: Self, b: Self) -> Bool {
        guard a.text.utf8CodeUnitCount == b.text.utf8CodeUnitCount else { return false }
        for i in 0..<a.text.utf8CodeUnitCount where a.text.utf8Start[i] != b.text.utf8Start[i] { return false }
        return true
    }
}
