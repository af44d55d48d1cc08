import Frames
import GuestMemory
import HostMemory
import Synchronization
import Synchrony

/// A table that only a fetch keeps from being a huge leaf: of the TDP MMU, or a shadow page's.
struct PossibleHugePage: Equatable {
    let table: HostFrame
    let isShadow: Bool
}

/// Those of a VM, oldest first, whichever MMU has made them. Kernel: `possible_nx_huge_pages`. Spec: x86 3.11, X42.
///
/// Under mmu_lock held for writing; where it is held for reading, under `TDPMMU.pages` too.
final class PossibleHugePages {
    var list: [PossibleHugePage] = []

    /// Kernel: `track_possible_nx_huge_page`.
    func add(_ page: PossibleHugePage, _ vm: VirtualMachine) {
        list.append(page)
        vm.statistics.nx_lpage_splits.add(1, ordering: .relaxed)
    }

    /// Kernel: `untrack_possible_nx_huge_page`.
    func remove(_ page: PossibleHugePage, _ vm: VirtualMachine) {
        guard let index = list.firstIndex(of: page) else { return }
        list.remove(at: index)
        vm.statistics.nx_lpage_splits.subtract(1, ordering: .relaxed)
    }

    /// One round of the recovery: hands the oldest to `end`, one in `ratio` (rounded up), which takes each off the list and
    /// says whether it is gone. Returns how many are. mmu_lock for writing; the caller flushes.
    func recover(ratio: Int, _ end: (PossibleHugePage) -> Bool) -> Int {
        var count = 0
        var left = (list.count + ratio - 1) / ratio
        while left > 0, let oldest = list.first {
            left -= 1
            if end(oldest) { count += 1 }
        }
        return count
    }
}

extension VirtualMachine {
    /// A change of the module's parameter: whatever is mapped is mapped anew. No lock held; may sleep. Takes slots_lock.
    /// `set` is called under mmu_lock for writing; false: the parameter was like that before. Kernel: `set_nx_huge_pages`.
    func changeNXHugePages(set: () -> Bool, zapAllFast: () -> Void) {
        slotsLock.lock()
        defer { slotsLock.unlock() }
        let guardian = lockMMU()
        let changes = set()
        guardian.unlock()
        if changes { zapAllFast() }
    }
}
