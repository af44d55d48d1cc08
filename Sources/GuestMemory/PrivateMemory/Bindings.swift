import Audit
import Frames
import HostMemory
import Synchronization
import Synchrony

/// A stretch of a file that a slot shows, page by page. Kernel: a range of `gmem->bindings`.
struct GuestMemoryBinding {
    /// Indices of pages in the file.
    let pages: Range<UInt64>
    let slot: MemorySlot

    /// The guest frames that show the pages of `range`.
    func frames(showing range: Range<UInt64>) -> Range<GuestFrame>? {
        let low = max(range.lowerBound, pages.lowerBound)
        let high = min(range.upperBound, pages.upperBound)
        guard low < high else { return nil }
        let base = slot.baseFrame.number
        return GuestFrame(base + low - pages.lowerBound)..<GuestFrame(base + high - pages.lowerBound)
    }
}

/// A slot's weak hold on its file. Kernel: `slot->gmem`.
///
/// The file is written under slots_lock; who follows it without that is inside a section of `PrivateMemory.readers` and
/// takes a reference there, or finds that the file is dying.
public final class SlotGuestMemory: @unchecked Sendable {
    // Unchecked: an atomic pointer to an object that may be shared.
    /// The page of the file that the slot's first page shows. Kernel: `pgoff`.
    public let firstPage: UInt64
    // Unretained: a file that goes has every slot forget it before, and waits for the readers.
    private let file = Atomic<UnsafeMutableRawPointer?>(nil)
    private let identity = ObjectIdentity()

    init(firstPage: UInt64) { self.firstPage = firstPage }

    /// The file, dying or not. Caller holds slots_lock, which a release takes before the file goes.
    var boundFile: GuestMemoryFile? {
        schedulingNote(.atomicLoad, identity.value)
        guard let pointer = file.load(ordering: .acquiring) else { return nil }
        return Unmanaged<GuestMemoryFile>.fromOpaque(pointer).takeUnretainedValue()
    }

    /// Whether the slot has a file. No lock; for checks, and for what is checked again.
    public var isBound: Bool { file.load(ordering: .acquiring) != nil }

    func isBound(to file: GuestMemoryFile) -> Bool {
        self.file.load(ordering: .acquiring) == Unmanaged.passUnretained(file).toOpaque()
    }

    /// The file with a reference for the caller, who puts it; nil: none, or it is dying. Kernel: `kvm_gmem_get_file`.
    func file(_ readers: ReadSideSections) -> GuestMemoryFile? {
        let section = readers.enter()
        defer { readers.exit(section) }
        guard let found = boundFile, found.tryGet() else { return nil }
        return found
    }

    func remember(_ file: GuestMemoryFile) {
        schedulingPoint(.atomicStore, identity.value)
        self.file.store(Unmanaged.passUnretained(file).toOpaque(), ordering: .releasing)
    }

    func forgetFile() {
        schedulingPoint(.atomicStore, identity.value)
        file.store(nil, ordering: .releasing)
    }
}

/// What a user gave for a descriptor of private memory. Kernel: the `guest_memfd` field.
public enum GuestMemoryDescriptor: Sendable, Equatable {
    /// Not an open descriptor.
    case closed
    /// A file of another kind.
    case otherFile
    case file(GuestMemoryFile)

    public static func == (a: Self, b: Self) -> Bool {
        switch (a, b) {
        case (.closed, .closed), (.otherFile, .otherFile): true
        case (.file(let a), .file(let b)): a === b
        default: false
        }
    }
}

extension VirtualMachine {
    /// Binds a new slot to its file. The descriptor's reference is not kept: the slot's hold is weak. Caller holds
    /// slots_lock. EBADF: no file; EINVAL: another kind of file, another VM's, a bad offset, past the end, overlap.
    /// Kernel: `kvm_gmem_bind`. Spec: generic 2.15, 4.4 row 19.
    func bind(_ slot: MemorySlot, to descriptor: GuestMemoryDescriptor, offset: UInt64) throws(Errno) {
        guard let guestMemory = slot.guestMemory else { preconditionFailure("a slot without private memory is bound") }
        switch descriptor {
        case .closed: throw .EBADF
        case .otherFile: throw .EINVAL
        case .file(let file):
            guard file.tryGet() else { throw .EBADF }
            defer { file.put() }
            guard file.vm === self, Int64(bitPattern: offset) >= 0, offset & (pageSize - 1) == 0 else { throw .EINVAL }
            let first = offset >> pageShift
            guard first + slot.pageCount <= file.pageCount else { throw .EINVAL }
            try file.add(GuestMemoryBinding(pages: first..<first + slot.pageCount, slot: slot), guestMemory)
        }
    }

    /// Takes a slot that goes away out of its file. Caller holds slots_lock. Kernel: `kvm_gmem_unbind`.
    ///
    /// Also of a file that is dying, where Linux 6.13 returns early: the release, which is still to come and waits for
    /// slots_lock, would find the freed slot in the bindings (I-25). It needs no reference for that.
    func unbind(_ slot: MemorySlot) {
        guard let guestMemory = slot.guestMemory, let file = guestMemory.boundFile else { return }
        file.invalidateLock.lockForWrite()
        file.setBindings(file.bindings.filter { $0.slot !== slot })
        guestMemory.forgetFile()
        privateMemory.readers.synchronize()
        file.invalidateLock.unlockWrite()
    }
}

extension GuestMemoryFile {
    /// EINVAL: a page of it is bound already. Caller holds slots_lock.
    fileprivate func add(_ binding: GuestMemoryBinding, _ guestMemory: SlotGuestMemory) throws(Errno) {
        invalidateLock.lockForWrite()
        defer { invalidateLock.unlockWrite() }
        var place = bindings.count
        for (i, other) in bindings.enumerated() {
            if other.pages.overlaps(binding.pages) { throw .EINVAL }
            if other.pages.lowerBound > binding.pages.lowerBound { place = min(place, i) }
        }
        var new = bindings
        new.insert(binding, at: place)
        setBindings(new)
        guestMemory.remember(self)
    }

    /// The slot that shows the page at `index`. No lock. Kernel: `xa_load(&gmem->bindings, index)`.
    func slot(showing index: UInt64) -> MemorySlot? {
        bindingsLock.lock()
        defer { bindingsLock.unlock() }
        for binding in bindings where binding.pages.contains(index) { return binding.slot }
        return nil
    }

    // MARK: Invalidation. Caller holds invalidateLock over both, so that both see the same bindings.

    /// Unmaps the pages of `range` wherever slots show them; faults on them fail the retry check from now on. Whether
    /// any slot shows one. Kernel: `kvm_gmem_invalidate_begin`. Spec: generic 2.15, I-6, I-9.
    func beginInvalidation(_ range: Range<UInt64>) -> Bool {
        let hit = bindings.compactMap { binding in
            binding.frames(showing: range).map { SlotPart(slot: binding.slot, frames: $0) }
        }
        guard !hit.isEmpty else { return false }
        vm.invalidate(hit)
        return true
    }

    /// Kernel: `kvm_gmem_invalidate_end`.
    func endInvalidation(_ found: Bool) {
        guard found else { return }
        let guardian = vm.lockMMU()
        vm.endInvalidation()
        guardian.unlock()
    }
}

/// Some guest frames of one slot.
struct SlotPart {
    let slot: MemorySlot
    let frames: Range<GuestFrame>
}

extension VirtualMachine {
    /// Begins an invalidation of guest frames and unmaps them, with one flush. `prepare` runs first, under mmu_lock.
    /// Takes mmu_lock. Spec: generic 3.2.
    func invalidate(_ parts: [SlotPart], prepare: () -> Void = {}) {
        let guardian = lockMMU()
        beginInvalidation()
        prepare()
        var flush = false
        for part in parts {
            addRange(part.frames)
            if mmu.unmap(part.frames, in: part.slot.addressSpace, holding: guardian, mayBlock: true) { flush = true }
        }
        if flush && !Defect.flushMissing.isOn { flushRemoteTLBs() }
        guardian.unlock()
    }
}
