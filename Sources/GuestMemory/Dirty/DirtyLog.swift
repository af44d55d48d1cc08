import Audit
import Frames
import HostMemory
import Synchrony

/// The dirty log of slots: for migration, and nothing to do with the page's own dirty flag. Spec: generic section 5.
extension VirtualMachine {
    /// Logs a write to `frame`. Any lock. Kernel: `mark_page_dirty_in_slot`. Spec: generic 2.19, its steps in order.
    ///
    /// - Parameter cpu: the vCPU whose task writes; the kernel asks which vCPU is loaded here. Only it may say its name,
    ///   for only its task may push into its ring. Nil: a write of the VMM or of the kernel's own.
    ///
    /// A write without a vCPU is lost in a VM that has rings alone. Linux warns there, and so does a finding here; it warns
    /// in every VM on an architecture that has no reason for such writes, which says nothing about this one.
    @inline(__always)
    public func markDirty(_ frame: GuestFrame, in slot: MemorySlot, by cpu: VirtualCPU? = nil) {
        if slot.isLogged || (cpu != nil && cpu!.vm !== self) { logWrite(frame, in: slot, by: cpu) }
    }

    @inline(never)
    private func logWrite(_ frame: GuestFrame, in slot: MemorySlot, by cpu: VirtualCPU?) {
        if let cpu, cpu.vm !== self { return report("a vCPU writes to the memory of another VM", frame) }
        guard slot.isLogged else { return }
        let page = frame.number - slot.baseFrame.number
        if let cpu, let ring = cpu.ring {
            if ring.isFull { report("a dirty ring is full and is pushed into", frame, .i27) }
            ring.push(slot: slot.number, offset: page)
            note(ring, .ringPushed, cpu, offset: page, slot: slot.number)
            if ring.isSoftFull { cpu.post(VirtualCPU.Request.dirtyRingSoftFull) }
        } else if let bitmap = slot.dirtyBitmap {
            bitmap.set(page)
        } else {
            if usesDirtyRings { report("a write without a running vCPU is in no dirty ring", frame) }
            return
        }
        record(Event(.dirtyLogged, guest: frame.number, value: UInt64(slot.id)))
    }

    /// Kernel: the tracepoints `kvm_dirty_ring_push` and `kvm_dirty_ring_reset`.
    func note(_ ring: DirtyRing, _ kind: Event.Kind, _ cpu: VirtualCPU, offset: UInt64 = 0, slot: UInt32 = 0) {
        guard memory.journal != nil else { return }
        let (pushed, consumed) = ring.progress
        record(
            Event(
                kind, guest: offset, value: UInt64(pushed) | UInt64(consumed) << 32, extra: UInt64(slot),
                task: UInt8(truncatingIfNeeded: cpu.number)))
    }

    /// What Linux warns about.
    private func report(_ reason: StaticReason, _ frame: GuestFrame, _ invariant: Invariant = .i12) {
        memory.journal?.add(Finding(invariant, reason, guest: frame))
    }

    /// Sets the flags of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`; EINVAL for `initiallySet` without `enabled`.
    public func setManualProtect(_ flags: ManualProtect) throws(Errno) {
        if flags.initiallySet && !flags.enabled { throw .EINVAL }
        slotsLock.lock()
        manualProtect = flags
        slotsLock.unlock()
    }

    /// The bitmap's words. In legacy mode they are taken and the pages protected again; in manual mode only copied.
    /// Takes slotsLock. Kernel: `KVM_GET_DIRTY_LOG`. Spec: generic 5.3: bit taken, then protected, then flushed, then
    /// reported, so that a write through a stale translation is covered by this very report (X47).
    public func getDirtyLog(slot id: UInt32) throws(Errno) -> [UInt64] {
        guard usesDirtyBitmaps else { throw .ENXIO }
        guard isUserSlot(id) else { throw .EINVAL }
        slotsLock.lock()
        defer { slotsLock.unlock() }
        guard let slot = slot(numbered: id), let bitmap = slot.dirtyBitmap else { throw .ENOENT }
        mmu.syncLog()
        var report = [UInt64](repeating: 0, count: bitmap.wordCount)
        if manualProtect.enabled {
            for i in report.indices { report[i] = bitmap.word(i) }
            return report
        }
        let guardian = lockMMU()
        var flush = false
        for i in report.indices where bitmap.word(i) != 0 {
            report[i] = Defect.logBitTakenLate.isOn ? bitmap.word(i) : bitmap.take(i)
            flush = true
            mmu.protect(slot, first: slot.baseFrame.advanced(by: i * 64), mask: report[i], holding: guardian)
            if Defect.logBitTakenLate.isOn { report[i] |= bitmap.take(i) }
        }
        guardian.unlock()
        if flush { flushRemoteTLBs() }
        for i in report.indices where report[i] != 0 {
            record(
                Event(
                    .dirtyHarvested, guest: slot.baseFrame.number + UInt64(i * 64), value: report[i], extra: UInt64(id))
            )
        }
        return report
    }

    /// Clears the bits that are set in `bitmap` (bit 0 is `firstPage`) and protects those pages again. Takes slotsLock.
    /// Kernel: `KVM_CLEAR_DIRTY_LOG`. Spec: generic 5.4, its checks in order.
    public func clearDirtyLog(slot id: UInt32, firstPage: UInt64, pages: UInt64, bitmap mask: [UInt64]) throws(Errno) {
        guard usesDirtyBitmaps else { throw .ENXIO }
        guard isUserSlot(id) else { throw .EINVAL }
        guard firstPage % 64 == 0 else { throw .EINVAL }
        slotsLock.lock()
        defer { slotsLock.unlock() }
        guard let slot = slot(numbered: id), let bitmap = slot.dirtyBitmap else { throw .ENOENT }
        guard firstPage <= slot.pageCount, pages <= slot.pageCount - firstPage,
            pages % 64 == 0 || firstPage + pages == slot.pageCount
        else { throw .EINVAL }
        guard UInt64(mask.count) * 64 >= pages else { throw .EFAULT }
        mmu.syncLog()
        let guardian = lockMMU()
        var flush = false
        for i in 0..<Int((pages + 63) / 64) {
            let index = Int(firstPage / 64) + i
            let taken = bitmap.take(index, mask[i])
            guard taken != 0 else { continue }
            flush = true
            let first = slot.baseFrame.advanced(by: index * 64)
            mmu.protect(slot, first: first, mask: taken, holding: guardian)
            record(Event(.dirtyCleared, guest: first.number, value: taken, extra: UInt64(id)))
        }
        guardian.unlock()
        if flush { flushRemoteTLBs() }
    }
}
