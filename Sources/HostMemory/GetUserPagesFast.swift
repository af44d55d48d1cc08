import Audit
import Frames
import Synchronization
import Synchrony

/// Get-user-pages without locks: look, take, look again. Spec: generic 1.9.
///
/// The entry may change, and its page be freed, between the look and the taking. A page whose count is 0 can't be
/// taken; one that was freed and came back with another owner is given back, because then the entry has changed.
extension AddressSpace {
    /// One reference, or nil. Never sleeps, never faults; may be called with `mmu_lock` held.
    /// Kernel: `get_user_page_fast_only`.
    public func getUserPageFastOnly(_ address: UserAddress, write: Bool, holder: Holder) -> PageReference? {
        Self.getUserPageFastOnly(in: Unmanaged.passUnretained(self), address, write: write, holder: holder)
    }

    /// The same, without counting references to `space`, which the caller keeps.
    public static func getUserPageFastOnly(
        in space: Unmanaged<AddressSpace>, _ address: UserAddress, write: Bool, holder: Holder
    ) -> PageReference? {
        let page = space._withUnsafeGuaranteedRef { $0.grabFast(address, write: write, pin: false) }
        guard let page else { return nil }
        let memory = space._withUnsafeGuaranteedRef { Unmanaged.passUnretained($0.memory) }
        return PageReference(adopting: page, of: memory, holder: holder)
    }

    /// References on up to `count` consecutive pages; stops at the first that can't be had and returns how many were.
    /// A range that is not user space gives 0; the kernel says -EFAULT there, which its callers treat alike.
    /// Kernel: `get_user_pages_fast_only`.
    public func getUserPagesFastOnly(
        _ address: UserAddress, count: Int, write: Bool, holder: Holder,
        _ each: (Int, consuming PageReference) -> Void
    ) -> Int {
        let (bytes, overflow) = UInt64(count).multipliedReportingOverflow(by: pageSize)
        let (end, wraps) = address.value.addingReportingOverflow(bytes)
        guard !overflow, !wraps, end <= UserAddress.end.value else { return 0 }
        for i in 0..<count {
            guard let page = grabFast(address + UInt64(i) * pageSize, write: write, pin: false) else { return i }
            each(i, PageReference(adopting: page, of: memory, holder: holder))
        }
        return count
    }

    /// Pins without locks if it can, else as `pinUserPageUnlocked` does; poison is `fault` here. May sleep.
    /// Kernel: `pin_user_pages_fast(.., 1, ..)`.
    public func pinUserPageFast(
        _ address: UserAddress, write: Bool, holder: Holder
    ) throws(GetUserPagesError) -> PagePin {
        if let page = pinFast(address, write: write) {
            return PagePin(adopting: page, of: memory, holder: holder)
        }
        return try pinUserPageUnlocked(address, LookupFlags(write: write, honorNUMA: true), holder: holder)
    }

    /// Fork write-protects and shares pages that it believes not to be pinned: a pin that overlaps with one is undone.
    /// Kernel: `lockless_pages_from_mm` and `write_protect_seq`.
    private func pinFast(_ address: UserAddress, write: Bool) -> UnsafeMutablePointer<PageFrame>? {
        let seen = writeProtectSequence.read()
        guard seen & 1 == 0, let page = grabFast(address, write: write, pin: true) else { return nil }
        if writeProtectSequence.changed(since: seen) {
            memory.unpin(page)
            return nil
        }
        return page
    }

    /// Kernel: `gup_fast_pte_range`, `gup_fast_pmd_leaf`.
    @inline(__always)
    private func grabFast(
        _ address: UserAddress, write: Bool, pin: Bool
    ) -> UnsafeMutablePointer<PageFrame>? {
        guard address < UserAddress.end, let leaf = leaf(address) else { return nil }
        let entry = leaf.entry
        guard entry.isPresent, !entry.isSpecial, !write || entry.isWritable else { return nil }
        // The host keeps the memory alive: counting that here would cost more than the walk.
        return Unmanaged.passUnretained(memory)._withUnsafeGuaranteedRef { memory in
            let page = memory.page(leaf.frame(of: address))
            // Whether a page without an owner may be taken nobody says here: the slow walk asks its area. Kernel:
            // `gup_fast_folio_allowed`, as a kernel with secret memory has it.
            let refused = PageFlags.secret | PageFlags.withoutOwner
            guard page.pointee.flags.load(ordering: .relaxed) & refused == 0 else { return nil }
            guard pin ? memory.tryPin(page) : memory.tryGet(page) else { return nil }
            // The level-2 entry is looked at again too: a huge leaf may have been split, a table's page replaced.
            guard leaf.isUnchanged, !pin || write || !memory.mustUnshare(page, leaf.level) else {
                if pin { memory.unpin(page) } else { memory.put(page) }
                return nil
            }
            memory.mark(memory.head(of: page), PageFlags.accessed(.getUserPages))
            return page
        }
    }
}
