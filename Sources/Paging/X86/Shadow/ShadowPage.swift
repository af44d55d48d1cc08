import Frames
import GuestMemory
import HostMemory
import Synchronization

/// Where an entry lies.
struct EntryPlace {
    let table: HostFrame
    let index: Int

    /// - Parameter address: physical.
    init(_ address: UInt64) {
        table = HostFrame(address >> pageShift)
        index = Int(address & (pageSize - 1)) / 8
    }
}

/// A table of KVM's with what KVM knows of it: which guest table it shadows, or which guest frames it maps one to one,
/// and who points to it. Kernel: `struct kvm_mmu_page`. Spec: x86 1.7.
///
/// Written under mmu_lock held for writing, but for what tells of pages out of sync.
final class ShadowPage {
    var role: PageRole
    /// The guest's table, or the first frame that a direct page maps.
    let frame: GuestFrame
    let table: HostFrame
    /// Kernel: `mmu_valid_gen`. Spec: X62.
    let generation: UInt8
    /// The guest may have written its table since the entries here were made. Level 1 only. Set under mmu_lock held for
    /// reading too, with `ShadowMMU.unsyncPages`, by faults of a guest hypervisor's; cleared under mmu_lock held for
    /// writing. Spec: X49.
    var isUnsync: Bool {
        get { unsync.load(ordering: .acquiring) }
        set { unsync.store(newValue, ordering: .releasing) }
    }
    private let unsync = Atomic<Bool>(false)
    /// Entries whose page is unsync or has such below it. Spec: X50.
    private(set) var unsyncChildren = 0
    private var unsyncBits = InlineArray<8, UInt64>(repeating: 0)
    /// A direct page that a fetch has made, so that no huge leaf takes its place. Kernel: `nx_huge_page_disallowed`.
    var isHugePageDisallowed = false
    /// vCPUs whose root it is. Kernel: `root_count`.
    var rootCount = 0
    /// Emulated writes to the guest's table since it was last used. Kernel: `write_flooding_count`.
    var floods = 0
    /// How many had been made, this one counted.
    var serial: UInt64 = 0
    /// Remote flushes that there had been when nothing pointed to the page any more. Spec: X56.
    var flushesWhenZapped: UInt64 = 0
    /// What each entry maps: frame << 12 | rights. Nil: it follows from the page. Kernel: `shadowed_translation`.
    private var translations: [UInt64]
    /// Physical addresses of the entries that point here. Kernel: `parent_ptes`. Spec: X53.
    private(set) var parents: [UInt64] = []

    /// The next page of the same hash chain, which owns it.
    var next: ShadowPage?
    // The list of active pages, newest first; the chain owns them.
    unowned(unsafe) var newer: ShadowPage?
    unowned(unsafe) var older: ShadowPage?
    var isActive = false

    init(_ frame: GuestFrame, _ role: PageRole, table: HostFrame, generation: UInt8) {
        self.frame = frame
        self.role = role
        self.table = table
        self.generation = generation
        translations = role.shadowsEntries && role.level <= 3 ? [UInt64](repeating: 0, count: 512) : []
    }

    var level: PageLevel { PageLevel(role.level) }

    // MARK: What an entry maps

    /// Kernel: `kvm_mmu_page_get_gfn`.
    func guestFrame(of index: Int) -> GuestFrame {
        if role.isPassthrough { return frame }
        if !translations.isEmpty { return GuestFrame(translations[index] >> 12) }
        return GuestFrame(frame.number + UInt64(index) << (9 * UInt64(role.level - 1)))
    }

    /// Kernel: `kvm_mmu_page_get_access`.
    func rights(of index: Int) -> Rights {
        translations.isEmpty ? role.access : Rights(rawValue: UInt8(truncatingIfNeeded: translations[index] & 7))
    }

    /// Kernel: `kvm_mmu_page_set_translation`.
    func setTranslation(_ index: Int, _ frame: GuestFrame, _ rights: Rights) {
        guard !translations.isEmpty else { return }
        translations[index] = frame.number << 12 | UInt64(rights.rawValue)
    }

    /// The entry's physical address, by which the reverse maps know it.
    func place(of index: Int) -> UInt64 { table.physicalAddress + UInt64(index) * 8 }

    // MARK: Parents

    func addParent(_ place: UInt64) { parents.append(place) }

    func removeParent(_ place: UInt64) {
        guard let i = parents.firstIndex(of: place) else {
            preconditionFailure("an entry points to a page that does not know it (X53)")
        }
        parents.swapAt(i, parents.count - 1)
        parents.removeLast()
    }

    // MARK: Unsync children. Kernel: `unsync_child_bitmap`, `unsync_children`.

    func hasUnsyncChild(_ index: Int) -> Bool { unsyncBits[index >> 6] >> UInt64(index & 63) & 1 != 0 }

    /// False: the bit was set already.
    func setUnsyncChild(_ index: Int) -> Bool {
        guard !hasUnsyncChild(index) else { return false }
        unsyncBits[index >> 6] |= 1 << UInt64(index & 63)
        unsyncChildren += 1
        return true
    }

    func clearUnsyncChild(_ index: Int) {
        guard hasUnsyncChild(index) else { return }
        unsyncBits[index >> 6] &= ~(1 << UInt64(index & 63))
        unsyncChildren -= 1
    }

    /// The first marked entry from `index` on.
    func unsyncChild(from index: Int) -> Int? {
        var i = index
        while i < 512 {
            let rest = unsyncBits[i >> 6] >> UInt64(i & 63)
            if rest != 0 { return i + rest.trailingZeroBitCount }
            i = (i >> 6 + 1) << 6
        }
        return nil
    }
}
