import Audit
import Frames
import HostMemory
import Synchrony

/// The hart's G-stage walk: Sv39x4, Sv48x4, Sv57x4. Source: RISC-V privileged architecture, the H extension.
/// Spec: arches 2.1, 12.7.
///
/// Holds no lock. A and D go in by compare-exchange of the whole entry, after every check; if the entry has changed,
/// the walk starts again. sstatus.MXR counts as 0: executable does not imply readable.
public struct GStageWalker: Sendable {
    public let memory: PhysicalMemory
    /// MODE 63:60, VMID 57:44, PPN 43:0.
    public let hgatp: UInt64
    /// Whether the hart sets A and D (Svadu with ADUE), or faults where they are clear (Svade).
    public let hardwareAD: Bool
    /// Whether PBMT is understood (Svpbmt); else its bits are reserved.
    public let memoryTypes: Bool
    /// Written into the journal's events.
    public let vcpu: UInt8

    public init(
        memory: PhysicalMemory, hgatp: UInt64, hardwareAD: Bool, memoryTypes: Bool = false, vcpu: UInt8 = 0xff
    ) {
        self.memory = memory
        self.hgatp = hgatp
        self.hardwareAD = hardwareAD
        self.memoryTypes = memoryTypes
        self.vcpu = vcpu
    }

    public enum Mode: UInt8, Sendable, CaseIterable {
        case sv39x4 = 8
        case sv48x4 = 9
        case sv57x4 = 10
        /// 3, 4 or 5.
        public var levels: UInt8 { rawValue - 5 }
        /// The root's index has two bits more than the others.
        public var addressBits: Int { 12 + 9 * Int(levels) + 2 }
    }

    /// Nil for Bare, in which a guest would see the host's physical memory and which KVM never enters, and for modes
    /// that the architecture reserves.
    public var mode: Mode? { Mode(rawValue: UInt8(truncatingIfNeeded: hgatp >> 60)) }

    /// 16 KiB, aligned to that: the low two bits of the PPN read as zero.
    private var root: UInt64 { (hgatp & 0xfff_ffff_fffc) << pageShift }

    /// Translates one access; sets A and D if the hart does. A guest address that is wider than the mode faults.
    public func walk(_ address: GuestAddress, _ access: AccessKind) -> WalkResult {
        guard let mode else {
            return .misconfiguration(WalkFault(.rootPointer, address, access, level: .page4K))
        }
        let top = PageLevel(mode.levels)
        guard address.value >> UInt64(mode.addressBits) == 0 else {
            return .violation(WalkFault(.addressWidth, address, access, level: top))
        }
        while true {
            if let result = walkOnce(from: top, address, access) { return result }
        }
    }

    /// One walk from the root; nil if the leaf changed before A or D got into it.
    private func walkOnce(from top: PageLevel, _ address: GuestAddress, _ access: AccessKind) -> WalkResult? {
        var table = root
        var level = top
        while true {
            let index = address.value >> (12 + 9 * UInt64(level.rawValue - 1)) & (level == top ? 0x7ff : 0x1ff)
            let location = table + 8 * index
            guard memory.exists(HostFrame(location >> pageShift)) else {
                return .misconfiguration(WalkFault(.noMemory, address, access, level: level))
            }
            let word = memory.word(at: location)
            let entry = GStageEntry(bits: word.loadRacing())
            func fault(_ reason: WalkFault.Reason) -> WalkFault {
                let usable = entry.isValid && entry.isLeaf
                return WalkFault(
                    reason: reason, address: address, access: access, level: level, entry: entry.bits,
                    present: entry.isValid, rights: usable ? entry.rights : .none)
            }

            guard entry.isValid else { return .violation(fault(.absent)) }
            if let defect = entry.defect(at: level, memoryTypes: memoryTypes) { return .violation(fault(defect)) }
            guard entry.isLeaf else {
                guard level > .page4K else { return .violation(fault(.encoding)) }
                table = entry.address
                level = level.below
                continue
            }
            // Every G-stage access is checked as one from user mode.
            guard entry.bits & GStageEntry.user != 0, entry.rights.allow(access) else {
                return .violation(fault(.rights))
            }
            guard entry.address & (level.bytes - 1) == 0 else { return .violation(fault(.misaligned)) }
            let frame = HostFrame((entry.address | address.value & (level.bytes - 1)) >> pageShift)
            guard memory.exists(frame) else { return .misconfiguration(fault(.noMemory)) }
            let wanted = entry.bits | GStageEntry.accessed | (access == .write ? GStageEntry.dirty : 0)
            if wanted != entry.bits {
                guard hardwareAD else { return .violation(fault(.accessedDirty)) }
                guard setFlags(word, entry, wanted, address, level) else { return nil }
            }
            let dirty = wanted & GStageEntry.dirty != 0
            return .translated(Translation(frame: frame, level: level, rights: entry.rights, dirty: dirty))
        }
    }

    private func setFlags(
        _ word: AtomicWord, _ entry: GStageEntry, _ wanted: UInt64, _ address: GuestAddress, _ level: PageLevel
    ) -> Bool {
        guard word.compareExchange(expected: entry.bits, desired: wanted) == nil else { return false }
        recordFlags(
            in: memory, address: address, leaf: HostFrame(entry.address >> pageShift), level: level,
            old: entry.bits, new: wanted, accessed: GStageEntry.accessed, dirty: GStageEntry.dirty, vcpu: vcpu)
        return true
    }

    /// What the hart reports to the hypervisor for a walk that failed.
    public func trap(for fault: WalkFault) -> GStageTrap {
        let outside = fault.reason == .noMemory
        let cause: UInt64 =
            switch fault.access {
            case .execute: outside ? 1 : 20
            case .read: outside ? 5 : 21
            case .write: outside ? 7 : 23
            }
        return GStageTrap(cause: cause, htval: outside ? 0 : fault.address.value >> 2, stval: fault.address.value)
    }
}

/// The trap's registers. Kernel: `scause`, `htval`, `stval`. Spec: arches 2.1.
public struct GStageTrap: Sendable, Equatable {
    /// 20 fetch, 21 load, 23 store: guest-page faults; 1, 5, 7: access faults outside physical memory.
    public let cause: UInt64
    /// Guest physical address, shifted right by 2; 0 for access faults.
    public let htval: UInt64
    /// The faulting virtual address; the guest's own translation is off here, so the guest physical one.
    public let stval: UInt64

    public init(cause: UInt64, htval: UInt64, stval: UInt64) {
        self.cause = cause
        self.htval = htval
        self.stval = stval
    }

    /// The guest physical address, as KVM puts it together again.
    public var guestAddress: GuestAddress { GuestAddress(htval << 2 | stval & 3) }
}
