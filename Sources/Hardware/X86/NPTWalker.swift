import Frames
import HostMemory

/// The processor's walk of nested page tables: the ordinary format, in the paging mode that the host has, each access a user
/// access. Source: AMD APM volume 2, "Nested paging". Spec: x86 0.3, 1.2, 1.4.
///
/// A PAE host's four pointers are read in each walk, and can break it. Left out: encryption and the reverse map.
public struct NPTWalker: Sendable {
    public let memory: PhysicalMemory
    /// nCR3: 51:12 root; 31:12 of 32 bits; 31:5 of PAE.
    public let root: UInt64
    /// The host's, and not off. Of 32 bits: with CR4.PSE.
    public let mode: PagingMode
    /// The host's EFER.NXE.
    public let noExecute: Bool
    public let processor: PagingProcessor
    /// Written into the journal's events.
    public let vcpu: UInt8

    public init(
        memory: PhysicalMemory, root: UInt64, mode: PagingMode = .fourLevel, noExecute: Bool = true,
        processor: PagingProcessor = PagingProcessor(isAMD: true), vcpu: UInt8 = 0xff
    ) {
        precondition(mode != .off, "nested paging needs a host with paging")
        self.memory = memory
        self.root = root
        self.mode = mode
        self.noExecute = noExecute
        self.processor = processor
        self.vcpu = vcpu
    }

    public var rootLevel: PageLevel { PageLevel(mode.topLevel) }

    /// The host's registers as they count for nested tables: at CPL 3, CR0.WP, SMEP, SMAP and AC say nothing, and keys
    /// are not for them.
    private var registers: PagingRegisters {
        let extension32 = mode == .bits32 ? PagingRegisters.largePagesBit : PagingRegisters.physicalAddressExtensionBit
        return PagingRegisters(
            cr0: PagingRegisters.pagingBit | PagingRegisters.writeProtectBit, cr3: root,
            cr4: extension32 | (mode == .fiveLevel ? PagingRegisters.fiveLevelsBit : 0),
            efer: (mode.isLong ? PagingRegisters.longModeBit : 0) | (noExecute ? PagingRegisters.noExecuteBit : 0),
            privilegeLevel: 3)
    }

    /// Translates one access and sets A and D as the processor does.
    ///
    /// A guest address above what the levels translate (32, 48 or 57 bits) is a nested page fault without P, as if there were
    /// no entry: the manual leaves it to the guest's MAXPHYADDR to make it impossible.
    public func walk(_ address: GuestAddress, _ access: AccessKind) -> WalkResult {
        guard address.value >> (mode.isLong ? 12 + 9 * UInt64(rootLevel.rawValue) : 32) == 0 else {
            return .violation(WalkFault(.addressWidth, address, access, level: rootLevel))
        }
        var walker = LegacyWalker(tables: .physical(memory), registers: registers, processor: processor, vcpu: vcpu)
        walker.isStageTwo = true
        switch walker.translate(address.value, LinearAccess(access)) {
        case .translated(let translation):
            return .translated(
                Translation(
                    frame: translation.frame, level: translation.level, rights: translation.rights.walkRights,
                    dirty: translation.dirty))
        case .pageFault(let fault): return .violation(WalkFault(fault, address, access))
        case .outside, .nonCanonical, .stageTwo:
            // There is no second stage here, and the address was taken as it is.
            return .misconfiguration(WalkFault(.noMemory, address, access, level: rootLevel))
        }
    }

    /// EXITINFO1 of a nested page fault. Bits 32 and 33 say what was being translated: what the guest's own tables lead to,
    /// or one of these tables. Spec: x86 0.3.
    public func errorCode(of fault: WalkFault, finalTranslation: Bool = true) -> UInt64 {
        var code = UInt64(registers.errorBits(of: LinearAccess(fault.access)))
        if fault.present { code |= UInt64(PageFault.present) }
        if fault.reason == .reservedBits { code |= UInt64(PageFault.reserved) }
        return code | (finalTranslation ? 1 << 32 : 1 << 33)
    }
}

extension LinearRights {
    /// For a user access: without U nothing is permitted.
    var walkRights: WalkRights {
        guard user else { return .none }
        return WalkRights(read: true, write: writable, execute: executable)
    }
}

extension WalkFault {
    /// A nested page fault.
    init(_ fault: PageFault, _ address: GuestAddress, _ access: AccessKind) {
        let present = fault.reason != .absent
        self.init(
            reason: fault.reason, address: address, access: access, level: fault.level, entry: fault.entry,
            present: present, rights: present ? fault.rights.walkRights : .none)
    }
}
