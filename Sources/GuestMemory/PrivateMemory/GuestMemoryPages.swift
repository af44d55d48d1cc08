import Audit
import Frames
import HostMemory
import Synchrony

/// What `fallocate` is asked for. Kernel: `FALLOC_FL_*`, by their numbers.
public struct AllocationMode: Sendable, Equatable {
    public let bits: UInt32
    public init(bits: UInt32) { self.bits = bits }
    public static let keepSize = AllocationMode(bits: 1)
    public static let keepSizeAndPunchHole = AllocationMode(bits: 3)
}

extension GuestMemoryFile {
    /// Makes pages, or takes pages away. Offset and length in bytes. No lock held, not inside `withSlots`.
    /// EINVAL: no length or a negative offset (both signed), part of a page, making beyond the end. EOPNOTSUPP: another
    /// mode than the two. ENOMEM and EINTR leave what was made. Kernel: `fallocate`, `kvm_gmem_fallocate`.
    public func allocate(_ mode: AllocationMode, offset: UInt64, length: UInt64) throws(Errno) {
        guard Int64(bitPattern: offset) >= 0, Int64(bitPattern: length) > 0 else { throw .EINVAL }
        guard mode == .keepSize || mode == .keepSizeAndPunchHole else { throw .EOPNOTSUPP }
        guard (offset | length) & (pageSize - 1) == 0 else { throw .EINVAL }
        let pages = offset >> pageShift..<(offset + length) >> pageShift
        if mode == .keepSizeAndPunchHole { return punchHole(pages) }
        guard pages.upperBound <= pageCount else { throw .EINVAL }
        try makePages(pages)
    }

    /// Pages that are made here have no content yet: they are prepared when the guest first needs them.
    private func makePages(_ range: Range<UInt64>) throws(Errno) {
        invalidateLock.lockForRead()
        defer { invalidateLock.unlockRead() }
        for index in range {
            if vm.addressSpace.signals.pending { throw .EINTR }
            try makePage(index)
        }
    }

    @export(interface)
    private func makePage(_ index: UInt64) throws(Errno) {
        let folio = try lockFolio(index, holder: .primary)
        let page = folio.unlock()
        page.releaseUnused()
    }

    /// Takes pages away: unmapped first, then gone. A fault that has found one of them meanwhile fails the retry check.
    /// Beyond the end there is nothing. Kernel: `kvm_gmem_punch_hole`.
    private func punchHole(_ range: Range<UInt64>) {
        invalidateLock.lockForWrite()
        let found = beginInvalidation(range)
        removePages(range)
        endInvalidation(found)
        invalidateLock.unlockWrite()
    }

    /// Whoever maps the page loses it. Takes invalidateLock.
    func unmapFailed(_ index: UInt64) {
        invalidateLock.lockForRead()
        let found = beginInvalidation(index..<index + 1)
        endInvalidation(found)
        invalidateLock.unlockRead()
    }
}

extension VirtualMachine {
    /// The private page of a guest frame, with one reference, prepared. May sleep; inside `withSlots`, or slots_lock held.
    /// EFAULT: the slot has no file (any more); EIO: the file does not know the slot; ENOMEM; EHWPOISON; what the
    /// architecture says when it prepares the page. An error gives no reference. The largest leaf is one page.
    /// Kernel: `kvm_gmem_get_pfn`. Spec: generic 2.15, 2.20.
    @export(interface)
    public func privatePage(
        of frame: GuestFrame, in slot: MemorySlot, holder: Holder = .guestFault
    ) throws(Errno) -> PageReference {
        guard let guestMemory = slot.guestMemory, let file = guestMemory.file(privateMemory.readers) else {
            throw .EFAULT
        }
        defer { file.put() }
        let index = guestMemory.firstPage + (frame.number - slot.baseFrame.number)
        let folio = try lockPage(index, of: file, in: slot, holder)
        if !folio.isPrepared {
            folio.clear()
            do throws(Errno) {
                try mmu.preparePrivatePage(folio.frame, at: frame)
            } catch {
                let page = folio.unlock()
                page.releaseUnused()
                throw error
            }
            folio.markPrepared()
        }
        return folio.unlock()
    }

    /// The page of a slot, locked, prepared or not. Kernel: `__kvm_gmem_get_pfn`.
    @export(interface)
    private func lockPage(
        _ index: UInt64, of file: GuestMemoryFile, in slot: MemorySlot, _ holder: Holder
    ) throws(Errno) -> LockedFolio {
        let shown = file.slot(showing: index)
        guard shown === slot else {
            if shown != nil { warn(.i25, "a slot's pages are bound to another slot", slot.baseFrame) }
            throw .EIO
        }
        let folio = try file.lockFolio(index, holder: holder)
        if folio.isPoisoned {
            let page = folio.unlock()
            page.releaseUnused()
            throw .EHWPOISON
        }
        return folio
    }

    func warn(_ invariant: Invariant, _ reason: StaticReason, _ frame: GuestFrame) {
        memory.journal?.add(Finding(invariant, reason, guest: frame))
    }

    /// Fills private pages before the guest runs: `fill` gets the guest frame, the host frame and the page's bytes, which
    /// it must write all, since they are whatever was there before; it runs under the page's lock and may not touch the
    /// user's memory. Returns how many pages were filled; an error comes
    /// only where none was. No lock held. Kernel: `kvm_gmem_populate` under slots_lock.
    ///
    /// EINVAL: `count` < 0, a frame outside of private slots, a frame whose attribute is not private; EFAULT: no file;
    /// EEXIST: the page has the guest's content already; EINTR; `privatePage`'s and `fill`'s own.
    public func populate(
        from first: GuestFrame, count: Int,
        _ fill: (GuestFrame, HostFrame, UnsafeMutableRawPointer) throws(Errno) -> Void
    ) throws(Errno) -> Int {
        slotsLock.lock()
        defer {
            slotsLock.unlock()
            runPostponedWork()
        }
        guard count >= 0, let slot = slot(containing: first), let guestMemory = slot.guestMemory else { throw .EINVAL }
        guard let file = guestMemory.file(privateMemory.readers) else { throw .EFAULT }
        defer { file.put() }
        file.invalidateLock.lockForWrite()
        defer { file.invalidateLock.unlockWrite() }
        let last = min(slot.frames.upperBound.number - first.number, UInt64(count))
        for i in 0..<Int(last) {
            do throws(Errno) {
                try populate(first.advanced(by: i), slot, guestMemory, file, fill)
            } catch {
                guard i > 0 else { throw error }
                return i
            }
        }
        return Int(last)
    }

    @export(interface)
    private func populate(
        _ frame: GuestFrame, _ slot: MemorySlot, _ guestMemory: SlotGuestMemory, _ file: GuestMemoryFile,
        _ fill: (GuestFrame, HostFrame, UnsafeMutableRawPointer) throws(Errno) -> Void
    ) throws(Errno) {
        if addressSpace.signals.pending { throw .EINTR }
        let index = guestMemory.firstPage + (frame.number - slot.baseFrame.number)
        let folio = try lockPage(index, of: file, in: slot, .framePage)
        var failure: Errno?
        if folio.isPrepared {
            failure = .EEXIST
        } else if !isPrivate(frame) {
            failure = .EINVAL
        } else {
            do throws(Errno) {
                try fill(frame, folio.frame, folio.bytes)
                folio.markPrepared()
            } catch {
                failure = error
            }
        }
        let page = folio.unlock()
        page.releaseUnused()
        if let failure { throw failure }
    }
}
