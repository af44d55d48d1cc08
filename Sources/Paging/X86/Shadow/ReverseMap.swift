import Frames
import GuestMemory

/// Which entries map each frame of a slot, by level; and which frames hold guest page tables that may not be written.
/// Kernel: `rmap`. Spec: x86 1.7, 4.3. Under mmu_lock held for writing.
///
/// An entry is known by its physical address. One entry stands in the head itself, more in a list beside it.
final class ReverseMap: TrackedFrames, @unchecked Sendable {
    // Unchecked: restates the base class's; what is here is under mmu_lock held for writing.
    private let base: GuestFrame
    private var levels: [[UInt64]] = []
    private var lists: [[UInt64]] = []
    private var freeLists: [Int] = []

    override init(_ slot: MemorySlot) {
        base = slot.baseFrame
        let last = slot.baseFrame.number + slot.pageCount - 1
        for level in [PageLevel.page4K, .page2M, .page1G] {
            let count = last / level.frames - slot.baseFrame.number / level.frames + 1
            levels.append([UInt64](repeating: 0, count: Int(count)))
        }
        super.init(slot)
    }

    private func index(_ frame: GuestFrame, _ level: PageLevel) -> Int {
        Int(frame.number / level.frames - base.number / level.frames)
    }

    /// Adds an entry; how many there were.
    func add(_ place: UInt64, _ frame: GuestFrame, _ level: PageLevel) -> Int {
        let i = index(frame, level)
        let l = Int(level.rawValue) - 1
        let head = levels[l][i]
        if head == 0 {
            levels[l][i] = place
            return 0
        }
        if head & 1 != 0 {
            let list = Int(head >> 1)
            lists[list].append(place)
            return lists[list].count - 1
        }
        let list: Int
        if let free = freeLists.popLast() {
            list = free
            lists[list] = [head, place]
        } else {
            list = lists.count
            lists.append([head, place])
        }
        levels[l][i] = UInt64(list) << 1 | 1
        return 1
    }

    /// False: the entry is not there.
    func remove(_ place: UInt64, _ frame: GuestFrame, _ level: PageLevel) -> Bool {
        let i = index(frame, level)
        let l = Int(level.rawValue) - 1
        let head = levels[l][i]
        if head & 1 == 0 {
            guard head == place, head != 0 else { return false }
            levels[l][i] = 0
            return true
        }
        let list = Int(head >> 1)
        guard let found = lists[list].firstIndex(of: place) else { return false }
        lists[list].swapAt(found, lists[list].count - 1)
        lists[list].removeLast()
        if lists[list].isEmpty {
            levels[l][i] = 0
            freeLists.append(list)
        }
        return true
    }

    /// The entries that map the block of `level` around `frame`: a copy.
    func entries(_ frame: GuestFrame, _ level: PageLevel) -> [UInt64] {
        let head = levels[Int(level.rawValue) - 1][index(frame, level)]
        if head == 0 { return [] }
        return head & 1 != 0 ? lists[Int(head >> 1)] : [head]
    }

    func isEmpty(_ frame: GuestFrame, _ level: PageLevel) -> Bool {
        levels[Int(level.rawValue) - 1][index(frame, level)] == 0
    }

    /// All entries of all levels. For checks.
    var count: Int {
        levels.reduce(0) { $0 + $1.reduce(0) { $0 + ($1 == 0 ? 0 : $1 & 1 == 0 ? 1 : lists[Int($1 >> 1)].count) } }
    }
}
