import Frames

/// What slots are ordered by.
protocol SlotOrder {
    /// Where the slot begins, and the first number after it.
    static func first(_ slot: MemorySlot) -> UInt64
    static func end(_ slot: MemorySlot) -> UInt64
}

/// By guest frame: no two slots of one set overlap.
enum ByFrame: SlotOrder {
    static func first(_ slot: MemorySlot) -> UInt64 { slot.baseFrame.number }
    static func end(_ slot: MemorySlot) -> UInt64 { slot.baseFrame.number + slot.pageCount }
}

/// By user address: slots may overlap, and two may even be equal.
enum ByAddress: SlotOrder {
    static func first(_ slot: MemorySlot) -> UInt64 { slot.userAddress.value }
    static func end(_ slot: MemorySlot) -> UInt64 { slot.userAddress.value + slot.pageCount << 12 }
}

/// Slots in order, in short runs, so that a change moves a few hundred bytes and not the whole list. With 32,764 slots, as
/// many as a user may have, there are some 500 runs. Kernel: the set's `gfn_tree` and `hva_tree`.
struct OrderedSlots<Order: SlotOrder> {
    /// Neighbours in the order, and the smallest first and largest end among them. The numbers lie beside each other, so
    /// that a search does not go from object to object.
    private struct Run {
        var slots: [MemorySlot]
        var firsts: [UInt64]
        var ends: [UInt64]
        var first: UInt64
        var end: UInt64

        init(_ slots: [MemorySlot]) {
            self.slots = slots
            firsts = slots.map(Order.first)
            ends = slots.map(Order.end)
            first = firsts.first ?? 0
            end = ends.max() ?? 0
        }

        mutating func insert(_ slot: MemorySlot, at place: Int) {
            slots.insert(slot, at: place)
            firsts.insert(Order.first(slot), at: place)
            ends.insert(Order.end(slot), at: place)
            first = firsts[0]
            end = max(end, ends[place])
        }

        mutating func remove(at place: Int) {
            slots.remove(at: place)
            firsts.remove(at: place)
            let gone = ends.remove(at: place)
            first = firsts[0]
            if gone == end { end = ends.max() ?? 0 }
        }
    }

    /// Slots of a run, at most.
    private static var most: Int { 128 }

    /// None is empty.
    private var runs: [Run] = []
    private(set) var count = 0

    /// All slots, in order.
    var all: [MemorySlot] {
        var all: [MemorySlot] = []
        all.reserveCapacity(count)
        for run in runs { all += run.slots }
        return all
    }

    /// The last slot that begins at `number` or before.
    func last(startingAtOrBefore number: UInt64) -> MemorySlot? {
        let index = runs.firstIndex(from: { $0.first > number }) - 1
        guard index >= 0 else { return nil }
        let place = runs[index].firsts.firstIndex(from: { $0 > number })
        return runs[index].slots[place - 1]
    }

    /// Calls `body` for every slot that intersects `first..<end`, in order, until it says false.
    func forEach(intersecting first: UInt64, _ end: UInt64, _ body: (MemorySlot) -> Bool) {
        for index in runs.indices {
            if runs[index].first >= end { return }
            if runs[index].end <= first { continue }
            for place in runs[index].firsts.indices {
                if runs[index].firsts[place] >= end { return }
                if runs[index].ends[place] > first, !body(runs[index].slots[place]) { return }
            }
        }
    }

    mutating func insert(_ slot: MemorySlot) {
        count += 1
        guard !runs.isEmpty else {
            runs.append(Run([slot]))
            return
        }
        let first = Order.first(slot)
        let index = max(runs.firstIndex(from: { $0.first > first }) - 1, 0)
        runs[index].insert(slot, at: runs[index].firsts.firstIndex(from: { $0 > first }))
        if runs[index].slots.count > Self.most { split(index) }
    }

    private mutating func split(_ index: Int) {
        let slots = runs[index].slots
        let middle = slots.count / 2
        runs[index] = Run(Array(slots[..<middle]))
        runs.insert(Run(Array(slots[middle...])), at: index + 1)
    }

    /// Takes `slot` out. It must be there.
    mutating func remove(_ slot: MemorySlot) {
        let (index, place) = position(of: slot)
        count -= 1
        if runs[index].slots.count == 1 {
            runs.remove(at: index)
            return
        }
        runs[index].remove(at: place)
    }

    /// Puts `new` in the place of `old`, which lies where it does.
    mutating func substitute(_ old: MemorySlot, by new: MemorySlot) {
        let (index, place) = position(of: old)
        runs[index].slots[place] = new
    }

    /// Slots that begin alike may have spread over several runs.
    private func position(of slot: MemorySlot) -> (run: Int, place: Int) {
        let first = Order.first(slot)
        var index = max(runs.firstIndex(from: { $0.first >= first }) - 1, 0)
        while index < runs.count, runs[index].first <= first {
            var place = runs[index].firsts.firstIndex(from: { $0 >= first })
            while place < runs[index].slots.count, runs[index].firsts[place] == first {
                if runs[index].slots[place] === slot { return (index, place) }
                place += 1
            }
            index += 1
        }
        preconditionFailure("a slot is not where its set has it (I-20)")
    }

    mutating func removeAll() {
        runs = []
        count = 0
    }
}

extension Array {
    /// The index of the first element from which on `predicate` holds; the count if it holds for none.
    @inline(__always)
    fileprivate func firstIndex(from predicate: (Element) -> Bool) -> Int {
        var low = 0
        var high = count
        while low < high {
            let middle = (low + high) / 2
            if predicate(self[middle]) { high = middle } else { low = middle + 1 }
        }
        return low
    }
}
