import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// What the MMU keeps about a table below a root, in the two words of the table's page frame. Written before the table
/// is linked, constant afterwards but for one bit. Kernel: `struct kvm_mmu_page`. Spec: x86 1.7.
struct TableInfo {
    /// Of its role: the level (1 to 3, or 4 under a root of level 5) and what the whole tree has in common.
    let role: PageRole
    /// The guest frame of entry 0.
    let base: GuestFrame
    /// A fetch has made it, and no huge leaf may take its place. Only this changes, under `pages`. Kernel:
    /// `nx_huge_page_disallowed`.
    let isDisallowed: Bool
    static let disallowed: UInt64 = 1 << 4
    /// The physical address of the one entry that points here. Kernel: `sp->ptep`. Spec: X29.
    let parent: UInt64

    var level: PageLevel { PageLevel(role.level) }

    /// 3:0 level   4 disallowed   5 nothing is to be heard of its A and D   6 guest mode   7 address space   63:8 base
    var words: (UInt64, UInt64) {
        let tree = (role.accessDirtyDisabled ? 1 << 5 : 0) | (role.isGuestMode ? 1 << 6 : 0) | UInt64(role.space) << 7
        return (UInt64(role.level) | (isDisallowed ? Self.disallowed : 0) | tree | base.number << 8, parent)
    }

    /// The child of a table of `role`: one level down, else the same. Spec: x86 1.6.
    init(below role: PageRole, base: GuestFrame, isDisallowed: Bool, parent: UInt64) {
        var role = role
        role.level -= 1
        self.role = role
        self.base = base
        self.isDisallowed = isDisallowed
        self.parent = parent
    }

    init(_ words: (UInt64, UInt64)) {
        role = PageRole.tdpRoot(
            levels: UInt8(truncatingIfNeeded: words.0 & 15), accessDirty: words.0 & 1 << 5 == 0,
            space: UInt8(words.0 >> 7 & 1), guestMode: words.0 & 1 << 6 != 0)
        base = GuestFrame(words.0 >> 8)
        isDisallowed = words.0 & Self.disallowed != 0
        parent = words.1
    }
}

/// The tables that one fault may need, taken before the invalidation snapshot, when sleeping is allowed. What is left
/// over goes back. Kernel: `mmu_topup_memory_caches`.
struct TableReserve: ~Copyable {
    /// Nil: empty from the start.
    private var host: Unmanaged<Host>?
    private var first: HostFrame?
    private var second: HostFrame?
    private var third: HostFrame?
    private var fourth: HostFrame?

    init() {}

    /// Takes `count` (at most 4) empty tables. False: memory is used up. `host` outlives the reserve.
    @inline(never)
    mutating func fill(_ host: Host, count: Int) -> Bool {
        self.host = Unmanaged.passUnretained(host)
        first = count > 0 ? host.allocateTable(order: 0, fill: EntryBits.empty) : nil
        second = count > 1 ? host.allocateTable(order: 0, fill: EntryBits.empty) : nil
        third = count > 2 ? host.allocateTable(order: 0, fill: EntryBits.empty) : nil
        fourth = count > 3 ? host.allocateTable(order: 0, fill: EntryBits.empty) : nil
        let got = (first == nil ? 0 : 1) + (second == nil ? 0 : 1) + (third == nil ? 0 : 1) + (fourth == nil ? 0 : 1)
        return got == count
    }

    deinit { if let host { giveBack(host) } }

    @inline(never)
    private borrowing func giveBack(_ host: Unmanaged<Host>) {
        let host = host.takeUnretainedValue()
        if let first { host.freeTable(first) }
        if let second { host.freeTable(second) }
        if let third { host.freeTable(third) }
        if let fourth { host.freeTable(fourth) }
    }

    mutating func take() -> HostFrame? {
        defer {
            first = second
            second = third
            third = fourth
            fourth = nil
        }
        return first
    }
}

/// Linking, splitting and removing tables.
extension TDPMMU {
    /// Puts `child` at `position`, in place of nothing or of a huge leaf, whose memory the child then maps with the same
    /// bits, so that no TLB need be flushed. False: the entry has changed, and the child is the caller's.
    /// Kernel: `tdp_mmu_link_sp`, `tdp_mmu_split_huge_page`. Spec: x86 3.4, 3.6, F7.
    ///
    /// Caller: mmu_lock (reading, and a section, is enough), under which `seen` was observed at `position`; `tree` is the
    /// root's role.
    func link(
        _ child: HostFrame, at position: RadixPosition, _ frame: GuestFrame, _ tree: PageRole,
        isDisallowed: Bool = false, seen: borrowing ObservedEntry
    ) -> Bool {
        guard seen.value == position.value else { return false }
        let vm = vm
        write(child, at: position, frame, tree, isDisallowed: isDisallowed, seen: seen, vm)
        return linkWritten(child, at: position, frame, tree, seen: seen, vm)
    }

    /// Makes `child`, which nobody sees yet, ready to be linked at `position`. Caller as for `link`.
    func write(
        _ child: HostFrame, at position: RadixPosition, _ frame: GuestFrame, _ tree: PageRole,
        isDisallowed: Bool = false, seen: borrowing ObservedEntry, _ vm: VirtualMachine
    ) {
        var role = tree
        role.level = position.level.rawValue
        let words = TableInfo(
            below: role, base: frame.aligned(to: position.level), isDisallowed: isDisallowed,
            parent: position.table.physicalAddress + UInt64(position.index) * 8
        ).words
        lending(vm.host) { $0.setTableWords(child, words.0, words.1) }
        if EntryBits.isLeaf(seen.value, position.level.rawValue) { fill(child, with: seen, position.level.below, vm) }
    }

    /// The second half of `link`: `child` has been written for `position`. Caller as for `link`.
    func linkWritten(
        _ child: HostFrame, at position: RadixPosition, _ frame: GuestFrame, _ tree: PageRole,
        seen: borrowing ObservedEntry, _ vm: VirtualMachine
    ) -> Bool {
        guard seen.value == position.value else { return false }
        let table = lending(vm.host) { $0.table(child) }
        let attributes = bits.link(adDisabled: tree.accessDirtyDisabled)
        guard position.entry.link(table, attributes: attributes, expected: seen.value) == nil else { return false }
        if EntryBits.isLeaf(seen.value, position.level.rawValue), !Defect.splitUncounted.isOn {
            lending(vm.statistics) {
                $0.addPages(level: position.level.rawValue, -1)
                $0.addPages(level: position.level.below.rawValue, 512)
            }
        }
        vm.record(
            Event(
                .tableLinked, frame: child, guest: frame.aligned(to: position.level).number,
                level: position.level.rawValue, value: attributes | EntryBits.field.bits(for: child),
                extra: position.value))
        return true
    }

    /// Writes the 512 parts of a huge leaf into a table that nobody sees yet. A, D, W, HW and MW are inherited; what was
    /// not executable for its size alone is executable now.
    private func fill(
        _ child: HostFrame, with huge: borrowing ObservedEntry, _ childLevel: PageLevel, _ vm: VirtualMachine
    ) {
        let isSmall = childLevel == .page4K
        let freed = isSmall && nxHugePages
        let update = EntryUpdate(
            set: freed ? bits.execute : 0, clear: (isSmall ? EntryBits.large : 0) | (freed ? bits.noExecute : 0))
        let first = lending(vm.memory) { StageTwoEntry($0.entry(0, of: child), EntryBits.field) }
        first.storeParts(of: huge, childLevel: childLevel, update)
    }

    /// Ends a table that nothing points to any more: freezes every entry, ends what they mapped, and puts the table
    /// aside to be freed. Kernel: `handle_removed_pt`. Spec: x86 3.3, X28, X30.
    ///
    /// Caller: mmu_lock, inside a section that it leaves only after the flush that the removal needs (none if the root
    /// is invalid); so the grace period before the freeing is also one after the flush.
    ///
    /// `exclusive`: mmu_lock is held for writing, so no fault has found the table, and what is empty need not be frozen.
    func remove(_ table: HostFrame, exclusive: Bool = false) {
        switch vm.policy(for: .tornDown) {
        case .precise(let policy): remove(table, policy, exclusive)
        case .tracked(let policy): remove(table, policy, exclusive)
        case .guess(let policy): remove(table, policy, exclusive)
        }
    }

    private func remove<P: ReferencePolicy>(_ table: HostFrame, _ policy: P, _ exclusive: Bool) {
        let info = TableInfo(vm.host.tableWords(table))
        let level = info.level.rawValue
        let memory = vm.memory
        let journal = memory.journal
        let loggingBit = loggingBit
        record(Event(.tableRemoved, frame: table, guest: info.base.number, level: level))
        var leaves = 0
        // The entries one by one would be 512 points: one stands for the table, and whoever changes an entry names it too.
        schedulingPoint(.atomicUpdate, table.physicalAddress)
        let first = StageTwoEntry(memory.entry(0, of: table), EntryBits.field)
        // All of them (no entry is all ones): a fault that has already found this table must find it frozen.
        first.forEachIndex(below: 512, notHolding: exclusive ? EntryBits.empty : .max) { i in
            if exclusive, !EntryBits.isPresent(first.following(i).peek()) { return }
            let old = first.following(i).exchangeUnannounced(forEmpty: EntryBits.frozen)
            precondition(old != EntryBits.frozen, "a table is removed twice (X28)")
            guard old & EntryBits.mmuPresent != 0 else { return }
            if EntryBits.isTable(old, level) {
                remove(EntryBits.field.frame(in: old), policy, exclusive)
            } else {
                leaves += 1
                let guest = GuestFrame(info.base.number + UInt64(i) * info.level.frames)
                leafGone(old, guest, info.level, replacedBy: EntryBits.frozen, policy, loggingBit, journal)
            }
        }
        vm.statistics.addPages(level: level, -leaves)
        pages.lock()
        allowHugePage(table)
        removed.append(table)
        pages.unlock()
    }

    /// What the end of one leaf means, but for the counts. Kernel: a part of `handle_changed_spte`. Spec: x86 3.12.
    @inline(__always)
    func leafGone<P: ReferencePolicy>(
        _ old: UInt64, _ guest: GuestFrame, _ level: PageLevel, replacedBy new: UInt64, _ policy: P,
        _ loggingBit: UInt64, _ journal: Journal?
    ) {
        policy.leafRemoved(
            EntryBits.field.frame(in: old), counted: old & EntryBits.counted != 0, accessed: old & bits.accessed != 0,
            dirty: old & loggingBit != 0)
        if let journal {
            journal.record(
                Event(
                    .entryZapped, frame: EntryBits.field.frame(in: old), guest: guest.number, level: level.rawValue,
                    value: new, extra: old))
        }
    }

    /// The bit that says "written since": D, or W where the hardware keeps no D. Spec: x86 3.8.
    @inline(__always)
    var loggingBit: UInt64 { accessDirty ? bits.dirty : EntryBits.write }

    /// Frees the tables that were put aside, after a grace period. The one place that does. May sleep: no lock held, not
    /// inside a section. Kernel: the RCU callback `tdp_mmu_free_sp_rcu_callback`.
    func freeRemovedTables() {
        pages.lock()
        let tables = removed
        if !tables.isEmpty { removed = [] }
        pages.unlock()
        guard !tables.isEmpty else { return }
        self.tables.synchronize()
        for table in tables {
            if let journal = vm.memory.journal { checkRemoved(table, journal) }
            vm.host.freeTable(table)
        }
    }

    /// X30: what was in the table has been ended. Every entry of a removed table is frozen, or was never present.
    private func checkRemoved(_ table: HostFrame, _ journal: Journal) {
        let first = StageTwoEntry(vm.memory.entry(0, of: table), EntryBits.field)
        for i in 0..<512 where EntryBits.isPresent(first.following(i).peek()) {
            return journal.add(Finding(.x30, "a table is freed that still maps something", frame: table))
        }
    }
}
