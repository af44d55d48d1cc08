import Frames
import GuestMemory
import HostMemory
import Synchrony

/// Writes of the emulator to guest page tables. Spec: x86 2.9, 4.8.
extension ShadowMMU {
    /// The emulator has written `count` bytes at `address`: entries made from what was there go, and a page that is written
    /// again and again goes as a whole. No lock held, inside `withSlots`. Kernel: `kvm_mmu_track_write`.
    public func guestMemoryWritten(_ cpu: VirtualCPU, _ address: GuestAddress, count: Int) {
        let guardian = vm.lockMMU()
        if indirectPages > 0, !Defect.tableWriteUnheard.isOn { noteWrite(cpu, address, count) }
        guardian.unlock()
    }

    private func noteWrite(_ cpu: VirtualCPU, _ address: GuestAddress, _ count: Int) {
        Statistics.bump(vm.statistics.mmu_pte_write)
        let isEmpty = writtenEntry(cpu, address, count) == 0
        var zapped = ZappedPages()
        var flush = false
        // One may go with another: a table can stand at several levels of its own tree.
        for page in pages(shadowing: address.frame) where !page.role.isInvalid {
            if isMisaligned(page, address, count) || isFlooded(page) {
                zap(page, &zapped)
                Statistics.bump(vm.statistics.mmu_flooded)
                continue
            }
            guard let entries = entries(of: page, address, count) else { continue }
            for i in entries {
                if page.role.level > 1, !isEmpty {
                    Statistics.bump(vm.statistics.mmu_pde_zapped)
                }
                if emptyEntry(page, i) { flush = true }
            }
        }
        if zapped.isEmpty { if flush { vm.flushRemoteTLBs() } } else { commit(&zapped) }
    }

    /// What stands there now, as an entry of the vCPU's own kind; 0 if it is none or can't be read.
    /// Kernel: `mmu_pte_write_fetch_gpte`.
    private func writtenEntry(_ cpu: VirtualCPU, _ address: GuestAddress, _ count: Int) -> UInt64 {
        let registers = state(of: cpu).registers
        // Half of an entry of 8 bytes: all of it counts.
        let isWide = count == 8 || registers.physicalAddressExtension && count == 4
        guard isWide || count == 4 else { return 0 }
        var format = registers
        format.cr4 = isWide ? registers.cr4 | 1 << 5 : registers.cr4 & ~(1 << 5)
        let place = GuestAddress(isWide ? address.value & ~7 : address.value)
        guard place.offset + (isWide ? 8 : 4) <= pageSize else { return 0 }
        return readEntry(cpu, place, GuestEntryFormat(registers: format), atomically: true) ?? 0
    }

    private func pages(shadowing frame: GuestFrame) -> [ShadowPage] {
        var pages: [ShadowPage] = []
        index.forEach(near: frame) { page in
            if page.frame == frame, page.role.shadowsEntries, !isObsolete(page) { pages.append(page) }
            return true
        }
        return pages
    }

    /// Writes that cross an entry, or that no page-table code does. Kernel: `detect_write_misaligned`.
    private func isMisaligned(_ page: ShadowPage, _ address: GuestAddress, _ count: Int) -> Bool {
        let size: UInt64 = page.role.has4ByteEntries ? 4 : 8
        let offset = address.offset
        // Some guests set a flag by a store of a byte.
        if offset & (size - 1) == 0, count == 1 { return false }
        return (offset ^ (offset + UInt64(count) - 1)) & ~(size - 1) != 0 || count < 4
    }

    /// Kernel: `detect_write_flooding`. Pages of level 1 become unsync instead.
    private func isFlooded(_ page: ShadowPage) -> Bool {
        guard page.role.level > 1 else { return false }
        page.floods += 1
        return page.floods >= 3
    }

    /// The entries that a write touches. Nil: another page of the same table has them. Kernel: `get_written_sptes`.
    private func entries(of page: ShadowPage, _ address: GuestAddress, _ count: Int) -> Range<Int>? {
        var offset = address.offset
        var entries = 1
        guard page.role.has4ByteEntries else { return Int(offset / 8)..<Int(offset / 8) + 1 }
        // A shadow page has half as many entries as a guest table, each of twice the size; a PDE of 4 MiB is two of 2 MiB.
        offset <<= 1
        if page.role.level == 2 {
            offset &= ~7
            offset <<= 1
            entries = 2
        }
        let quadrant = offset >> 12
        guard quadrant == UInt64(page.role.quadrant) else { return nil }
        let first = Int(offset & 4095) / 8
        return first..<first + entries
    }

    /// Lets the guest write a frame that KVM shadows, by giving up the pages that do; whether there were any. No lock held.
    /// Kernel: `__kvm_mmu_unprotect_gfn_and_retry`, its first half.
    @discardableResult
    public func unprotect(_ frame: GuestFrame) -> Bool {
        let guardian = vm.lockMMU()
        var found = false
        var zapped = ZappedPages()
        for page in pages(shadowing: frame) where !page.role.isInvalid {
            zap(page, &zapped)
            found = true
        }
        commit(&zapped)
        guardian.unlock()
        return found
    }
}
