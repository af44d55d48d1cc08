import Audit
import Frames
import Synchronization
import Synchrony

/// What takes the place of a page's entries when it is unmapped.
enum Stead {
    /// The slot that holds, or will hold, its bytes.
    case swap(SwapDevice, Int)
    /// A note that the page is on its way to another frame. Whoever comes there waits.
    case migration
    /// Nothing: its owner gave the content up.
    case nothing
}

/// Taking every entry of a page away. Kernel: `try_to_unmap`, `try_to_migrate`.
extension Host {
    /// Replaces every entry of a small anonymous page, in each space between the notifier's start and end. The caller has a
    /// reference. False: an entry stayed, since the page is pinned, or, for `nothing`, was written or is in use.
    func unmap(anonymous page: UnsafeMutablePointer<PageFrame>, leaving stead: Stead) -> Bool {
        var gone = true
        forEachArea(anonymous: page) { space, _, address in
            gone = space.replace(page, at: address, by: stead)
            return gone
        }
        return gone && page.pointee.mapCount.load(ordering: .acquiring) == 0
    }
}

extension AddressSpace {
    /// Replaces the entry at `address` if it maps `page`. False: it had to stay. `mmapLock` held.
    func replace(_ page: UnsafeMutablePointer<PageFrame>, at address: UserAddress, by stead: Stead) -> Bool {
        guard let leaf = entry(of: page, at: address) else { return true }
        let range = address..<(address + pageSize)
        notifyStart(range)
        pageTableLock.lock()
        let seen = HostEntry(leaf.word.load())
        var result = true
        var cleared = false
        if seen.mapsFrame, !seen.isSpecial, seen.frame == memory.frame(of: page) {
            // The processor may set A or D until the entry is gone.
            let old = HostEntry(leaf.word.exchange(0))
            if let new = steadEntry(old, page, stead) {
                memory.record(
                    Event(.hostEntryCleared, frame: old.frame, guest: address.page, level: 1, value: old.bits))
                memory.noteEntryBits(old, page)
                page.pointee.mapCount.subtract(1, ordering: .relaxed)
                if new.bits != 0 { leaf.word.store(new.bits) }
                cleared = true
            } else {
                leaf.word.store(old.bits)
                result = false
            }
        }
        pageTableLock.unlock()
        notifyEnd(range)
        if cleared { memory.put(page) }
        return result
    }

    /// The small entry that maps `page` at `address`, if it does. A huge leaf is none.
    func entry(of page: UnsafeMutablePointer<PageFrame>, at address: UserAddress) -> HostLeaf? {
        guard let leaf = leaf(address), leaf.level == .page4K, leaf.entry.mapsFrame, !leaf.entry.isSpecial,
            leaf.entry.frame == memory.frame(of: page)
        else { return nil }
        return leaf
    }

    /// What stands for an entry that was just taken away. Nil: it must stay. A page that was shared from now on can't be
    /// pinned without being asked for: whoever pinned it before shows, since the entry is gone. Kernel:
    /// `folio_try_share_anon_rmap_pte`.
    private func steadEntry(
        _ old: HostEntry, _ page: UnsafeMutablePointer<PageFrame>, _ stead: Stead
    ) -> HostEntry? {
        let exclusive = memory.isExclusivelyAnonymous(page)
        switch stead {
        case .nothing:
            let flags = page.pointee.flags.load(ordering: .relaxed)
            let expected = 1 + page.pointee.mapCount.load(ordering: .relaxed)
            let isUsed = page.pointee.referenceCount.load(ordering: .acquiring) != expected
            return old.isDirty || isUsed || flags & PageFlags.anyDirty != 0 ? nil : HostEntry(0)
        case .swap(let device, let slot):
            if exclusive, !share(page) { return nil }
            device.use(slot)
            let entry = HostEntry.swapped(slot: slot, exclusive: exclusive)
            return old.isUserProtected ? entry.setting(HostEntry.userProtected) : entry
        case .migration:
            if exclusive, !share(page) { return nil }
            return .migrating(old, exclusive: exclusive)
        }
    }

    /// Makes an exclusive page a shared one, unless somebody may have pinned it. `pageTableLock` held, the entry gone.
    private func share(_ page: UnsafeMutablePointer<PageFrame>) -> Bool {
        if memory.maybePinned(page) { return false }
        page.pointee.flags.bitwiseAnd(~PageFlags.anonymousExclusive, ordering: .relaxed)
        return true
    }
}
