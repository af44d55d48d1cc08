import Frames
import HostMemory

/// The processor's walk of nested page tables: the ordinary format, of four or five levels, each access a user access.
/// Source: AMD APM volume 2, "Nested paging". Spec: x86 0.3, 1.2, 1.4.
///
/// Left out: hosts with 32-bit or PAE paging, whose nested tables are in that format; encryption and the reverse map.
public struct NPTWalker: Sendable {
    public let memory: PhysicalMemory
    /// nCR3: 51:12 root.
    public let root: UInt64
    /// Whether the host has CR4.LA57: its levels are the nested tables'.
    public let fiveLevels: Bool
    /// The host's EFER.NXE.
    public let noExecute: Bool
    public let processor: PagingProcessor
    /// Written into the journal's events.
    public let vcpu: UInt8

    public init(
        memory: PhysicalMemory, root: UInt64, fiveLevels: Bool = false, noExecute: Bool = true,
        processor: PagingProcessor = PagingProcessor(isAMD: true), vcpu: UInt8 = 0xff
    ) {
        self.memory = memory
        self.root = root
        self.fiveLevels = fiveLevels
        self.noExecute = noExecute
        self.processor = processor
        self.vcpu = vcpu
    }

    public var rootLevel: PageLevel { PageLevel(fiveLevels ? 5 : 4) }

    /// The host's registers as they count for nested tables: at CPL 3, CR0.WP, SMEP, SMAP and AC say nothing, and keys
    /// are not for them.
    private var registers: PagingRegisters {
        PagingRegisters(
            cr0: PagingRegisters.pagingBit | PagingRegisters.writeProtectBit, cr3: root,
            cr4: PagingRegisters.physicalAddressExtensionBit | (fiveLevels ? PagingRegisters.fiveLevelsBit : 0),
            efer: PagingRegisters.longModeBit | (noExecute ? PagingRegisters.noExecuteBit : 0), privilegeLevel: 3)
    }

    /// Translates one access and sets A and D as the processor does.
    ///
    /// A guest address above what the levels translate (48 or 57 bits) is a nested page fault without P, as if there were
    /// no entry: the manual leaves it to the guest's MAXPHYADDR to make it impossible.
    public func walk(_ address: GuestAddress, _ access: AccessKind) -> WalkResult {
        guard address.value >> (12 + 9 * UInt64(rootLevel.rawValue)) == 0 else {
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
