/// What a TLB keeps: a number of entries, replaced in turn, so that two runs evict alike.
struct RoundRobin<Entry> {
    /// Grows to `capacity` as it is used.
    private(set) var slots: [Entry?] = []
    private var nextVictim = 0
    let capacity: Int

    init(capacity: Int) {
        precondition(capacity > 0, "a TLB has at least one entry")
        self.capacity = capacity
    }

    /// Puts `entry` where one stands that `isSame`, else where none does, else in place of the next in turn.
    mutating func put(_ entry: Entry, replacing isSame: (Entry) -> Bool) {
        slots[place(isSame)] = entry
    }

    private mutating func place(_ isSame: (Entry) -> Bool) -> Int {
        var free: Int?
        for i in slots.indices {
            guard let old = slots[i] else {
                if free == nil { free = i }
                continue
            }
            if isSame(old) { return i }
        }
        if let free { return free }
        if slots.count < capacity {
            slots.append(nil)
            return slots.count - 1
        }
        let victim = nextVictim
        nextVictim = (nextVictim + 1) % slots.count
        return victim
    }

    mutating func drop(where isDropped: (Entry) -> Bool) {
        for i in slots.indices {
            if let entry = slots[i], isDropped(entry) { slots[i] = nil }
        }
    }

    mutating func dropAll() {
        for i in slots.indices { slots[i] = nil }
    }

    /// In slot order: a copy.
    var entries: [Entry] { slots.compactMap { $0 } }
}
