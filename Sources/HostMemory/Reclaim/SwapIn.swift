import Audit
import Frames
import Synchronization
import Synchrony

/// A fault on a page that is on the swap device. Kernel: `do_swap_page`.
extension AddressSpace {
    func swapIn(
        _ vma: VMA, _ address: UserAddress, _ word: AtomicWord, _ seen: HostEntry, _ access: FaultAccess
    ) -> FaultOutcome {
        guard let swap = host.swap else { preconditionFailure("a swapped page without a swap device") }
        let page: UnsafeMutablePointer<PageFrame>
        let place = vma.backingPage(of: address)
        switch host.bringBack(seen.slot, place: place) {
        case .page(let found): page = found
        case .mustWait: return .waitForSwap(host, seen.slot, place: place)
        case .gone: return .done
        case .outOfMemory: return .failed(.outOfMemory)
        case .unreadable: return .failed(.bus)
        }
        pageTableLock.lock()
        // The slot may have been given up and taken by another page since the entry was read.
        guard word.load() == seen.bits, swap.holds(page, seen.slot) else {
            pageTableLock.unlock()
            memory.put(page)
            return .done
        }
        // With the last entry that names it the slot is given up, and the cache's reference with it.
        swap.release(seen.slot, memory)
        let alone = page.pointee.referenceCount.load(ordering: .acquiring) == 1
        if seen.wasExclusive || alone { page.pointee.flags.bitwiseOr(PageFlags.anonymousExclusive, ordering: .relaxed) }
        var entry = HostEntry.leaf(
            memory.frame(of: page), vma.flags, writable: vma.flags.write && (seen.wasExclusive || alone))
        if seen.isUserProtected {
            entry = entry.clearing(HostEntry.writable).setting(HostEntry.userProtected)
        }
        if access == .write, entry.isWritable { entry = entry.setting(HostEntry.dirty) }
        page.pointee.mapCount.add(1, ordering: .relaxed)
        setLeaf(word, entry, address)
        pageTableLock.unlock()
        return .done
    }
}

extension Host {
    enum SwappedPage {
        /// With a reference for the caller.
        case page(UnsafeMutablePointer<PageFrame>)
        case mustWait
        /// Nothing names the slot any more: look again.
        case gone
        case outOfMemory, unreadable
    }

    /// The page of a slot, read in if it is not in memory and needs no waiting.
    fileprivate func bringBack(_ slot: Int, place: Int) -> SwappedPage {
        guard let swap else { return .gone }
        switch swap.lookUp(slot, memory) {
        case .page(let page): return .page(page)
        case .unreadable: return .unreadable
        case .absent: break
        }
        if swap.slow { return .mustWait }
        return readIn(slot, place: place)
    }

    /// Reads a slot into a new page of the cache. The slot may be given up meanwhile: then the page is thrown away.
    fileprivate func readIn(_ slot: Int, place: Int) -> SwappedPage {
        guard let swap, let frame = memory.allocatePages(order: 0) else { return .outOfMemory }
        let page = memory.page(frame)
        guard swap.read(slot, into: frame, memory) else {
            memory.put(page)
            return .unreadable
        }
        page.pointee.flags.bitwiseOr(PageFlags.anonymous, ordering: .relaxed)
        page.pointee.word0 = UInt64(place)
        guard swap.enterIfAbsent(page, slot, memory) else {
            memory.put(page)
            return .gone
        }
        memory.lists?.add(page)
        return .page(page)
    }

    /// Reads a slot in for whoever waits for it. No lock held.
    func waitForSwap(_ slot: Int, place: Int) {
        switch readIn(slot, place: place) {
        case .page(let page): memory.put(page)
        case .unreadable: swap?.markUnreadable(slot)
        case .mustWait, .gone, .outOfMemory: break
        }
    }
}
