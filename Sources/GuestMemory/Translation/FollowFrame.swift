import Audit
import Frames
import HostMemory
import Synchrony

/// A wish to translate one guest frame. Kernel: `struct kvm_follow_pfn`. Spec: generic 1.6.
struct FollowRequest {
    var frame: GuestFrame
    var write: Bool
    var noWait = false
    var interruptible = false
    /// A read that would like a writable mapping, if it comes for free. Kernel: `map_writable` non-NULL.
    var wantsWritable = false
    var holder: Holder
}

/// What a translation gave, and what the caller now owns. Spec: generic 2.8.
enum Followed: ~Copyable {
    /// GUP found it; one reference is owned.
    case page(PageReference, writable: Bool)
    /// The PFN-map walk found it. `guessed`: under the policy `guess` a reference may be owned. `counted`: under
    /// `tracked` the page looked counted.
    case mapped(HostFrame, writable: Bool, guessed: Bool, counted: Bool)
    case failed(TranslationError)
}

extension VirtualMachine {
    // `@export(interface)`, here and elsewhere: Embedded Swift 6.3 compiles a function again in the modules that import
    // it, and cannot destroy an owned reference of a third module there. Such a body stays where it is.

    /// The one way from a guest frame to a host frame through the user's mappings. May sleep; inside `withSlots`.
    /// Kernel: `kvm_follow_pfn`. Spec: generic 2.2, the rows of its table in order.
    @export(interface)
    func follow(_ request: FollowRequest, in slot: MemorySlot?) -> Followed {
        follow(request, in: slot.map { Unmanaged.passUnretained($0) })
    }

    /// The same for a slot that is borrowed from the section.
    @export(interface)
    func follow(_ request: FollowRequest, in slot: Unmanaged<MemorySlot>?) -> Followed {
        guard let slot, !slot._withUnsafeGuaranteedRef({ $0.isInvalid }) else { return .failed(.noSlot) }
        let isReadOnly = slot._withUnsafeGuaranteedRef { $0.flags.readOnly }
        if isReadOnly && request.write { return .failed(.readOnly) }
        var request = request
        // A read-only slot never yields a writable mapping, so none is tried for.
        if isReadOnly { request.wantsWritable = false }
        return translate(slot._withUnsafeGuaranteedRef { $0.userAddress(of: request.frame) }, request)
    }

    /// Kernel: `hva_to_pfn`. Spec: generic 2.3: A fast, B slow, C the PFN map.
    @export(interface)
    func translate(_ address: UserAddress, _ request: FollowRequest) -> Followed {
        if !SeriesPatch.mayAlwaysSleep.isUndone { mightSleep() }
        if let page = fast(address, request) { return .page(page, writable: true) }
        return slowly(address, request)
    }

    /// Steps B and C.
    @inline(never)
    private func slowly(_ address: UserAddress, _ request: FollowRequest) -> Followed {
        switch slow(address, request) {
        case .page(let page, let writable): return .page(page, writable: writable)
        case .failed(.signalPending): return .failed(.signalPending)
        case .failed(.hardwarePoison): return .failed(.hardwarePoison)
        default:
            if SeriesPatch.oneLookForPoison.isUndone, !request.noWait, isPoisoned(address, request.holder) {
                return .failed(.hardwarePoison)
            }
            return throughPFNMap(address, request)
        }
    }

    /// A lookup for the sake of its error alone. Kernel: `check_user_page_hwpoison`, which went with the series.
    private func isPoisoned(_ address: UserAddress, _ holder: Holder) -> Bool {
        let flags = LookupFlags(write: true, hardwarePoison: true)
        do throws(GetUserPagesError) {
            try addressSpace.getUserPageUnlocked(address, flags, holder: holder).releaseUnused()
            return false
        } catch {
            return error == .hardwarePoison
        }
    }

    /// A page for write, without sleeping. A pure read must not come here: a lockless read-only grab could race with
    /// copy-on-write and leave KVM on the old page (Spec: generic 2.4, I-29).
    @inline(__always)
    private func fast(_ address: UserAddress, _ request: FollowRequest) -> PageReference? {
        guard request.write || request.wantsWritable else { return nil }
        return AddressSpace.getUserPageFastOnly(
            in: Unmanaged.passUnretained(addressSpace), address, write: true, holder: request.holder)
    }

    /// Kernel: `hva_to_pfn_slow`. Spec: generic 2.5.
    private func slow(_ address: UserAddress, _ request: FollowRequest) -> Followed {
        var flags = LookupFlags()
        flags.hardwarePoison = true
        flags.honorNUMA = true
        flags.write = request.write
        flags.noWait = request.noWait
        flags.interruptible = request.interruptible
        let page: PageReference
        do throws(GetUserPagesError) {
            page = try addressSpace.getUserPageUnlocked(address, flags, holder: request.holder)
        } catch {
            switch error {
            case .again where SeriesPatch.killedIsSignal.isUndone: return .failed(.fault)
            case .interrupted, .again: return .failed(.signalPending)
            case .hardwarePoison: return .failed(.hardwarePoison)
            default: return .failed(.fault)
            }
        }
        guard !request.write, request.wantsWritable else { return .page(page, writable: request.write) }
        // The page may be another one now, if copy-on-write was broken in between: the first reference goes.
        if let upgraded = addressSpace.getUserPageFastOnly(address, write: true, holder: request.holder) {
            page.releaseUnused()
            return .page(upgraded, writable: true)
        }
        return .page(page, writable: false)
    }

    /// Steps C to D. Spec: generic 2.3.
    func throughPFNMap(_ address: UserAddress, _ request: FollowRequest) -> Followed {
        addressSpace.mmapLock.lockForRead()
        defer { addressSpace.mmapLock.unlockRead() }
        while true {
            guard let vma = addressSpace.vmaLookup(address) else { return .failed(.fault) }
            if vma.flags.io || vma.flags.pfnMap {
                switch remapped(address, vma, request) {
                case .again: continue
                case .found(let frame, let writable, let guessed, let counted):
                    return .mapped(frame, writable: writable, guessed: guessed, counted: counted)
                case .failed(let error): return .failed(error)
                }
            }
            if request.noWait, vma.flags.read, !request.write || vma.flags.write {
                return .failed(SeriesPatch.needsIO.isUndone ? .fault : .needsIO)
            }
            return .failed(.fault)
        }
    }

    private enum Remapped {
        case found(HostFrame, writable: Bool, guessed: Bool, counted: Bool)
        case failed(TranslationError)
        /// mmap_lock was dropped: the VMA may be gone.
        case again
    }

    /// Kernel: `hva_to_pfn_remapped`. Spec: generic 2.6. mmap_lock is held for reading.
    ///
    /// Under `precise` no reference is taken here, with or without a page frame behind the entry: the mapping is
    /// guarded by the notifier alone (Spec: I-5).
    private func remapped(_ address: UserAddress, _ vma: VMAInfo, _ request: FollowRequest) -> Remapped {
        if let result = walk(address, vma, request) { return result }
        let fixup = addressSpace.fixupUserFault(address, write: request.write)
        if fixup.unlocked { return .again }
        if fixup.error != nil { return .failed(.fault) }
        return walk(address, vma, request) ?? .failed(.fault)
    }

    /// Takes the reference that the heuristic thinks of, or fails.
    private func referenced(_ frame: HostFrame, _ writable: Bool, by guess: Guess) -> Remapped {
        guard Defect.unownedPut.isOn || guess.takeMapped(frame) else { return .failed(.fault) }
        return .found(frame, writable: writable, guessed: true, counted: false)
    }

    private func walk(_ address: UserAddress, _ vma: VMAInfo, _ request: FollowRequest) -> Remapped? {
        addressSpace.withPFNMapping(of: address, in: vma) { mapping in
            if request.write && !mapping.writable { return .failed(.readOnly) }
            // Whoever may not have a writable mapping, above all a read-only slot, hears of none (Spec: generic 2.8).
            let writable = mapping.writable && request.wantsWritable
            switch policy {
            case .precise:
                if Defect.tailPageRefused.isOn, mapping.isUncounted { return .failed(.fault) }
                // A map's page is pinned or it has none.
                if SeriesPatch.mappedPagesUncounted.isUndone, request.holder != .hostMap {
                    return referenced(mapping.frame, writable, by: Guess(memory: memory))
                }
                return .found(mapping.frame, writable: writable, guessed: false, counted: false)
            case .guess(let guess): return referenced(mapping.frame, writable, by: guess)
            case .tracked(let tracked):
                guard let counted = tracked.classifyMapped(mapping.frame) else { return .failed(.fault) }
                return .found(mapping.frame, writable: writable, guessed: false, counted: counted)
            }
        }
    }
}
