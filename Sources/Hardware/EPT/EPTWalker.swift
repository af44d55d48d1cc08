import Audit
import Frames
import HostMemory
import Synchrony

/// The processor's EPT walk. Source: Intel SDM volume 3, "The Extended Page Table Mechanism". Spec: x86 1.1, 12.
///
/// Holds no lock: it races with whoever writes the tables, as hardware does. An accessed or dirty bit goes in by
/// compare-exchange against the entry that was judged; if the entry has changed, the whole walk starts again, so D is
/// never set in an entry whose W has just been cleared.
public struct EPTWalker: Sendable {
    public let memory: PhysicalMemory
    /// EPTP: 2:0 memory type, 5:3 levels - 1, 6 accessed and dirty bits on, 51:12 root.
    public let pointer: UInt64
    let processor: EPTProcessor
    /// Where guest addresses go whose D is set; nil with page-modification logging off.
    public let log: ModificationLog?
    /// Written into the journal's events.
    public let vcpu: UInt8

    /// - Parameters:
    ///   - physicalAddressBits: MAXPHYADDR, 32 to 52.
    ///   - executeOnly: whether R=0, W=0, X=1 is legal.
    ///   - largestLeaf: 1 GiB, 2 MiB or 4 KiB.
    public init(
        memory: PhysicalMemory, pointer: UInt64, physicalAddressBits: Int = 46, executeOnly: Bool = true,
        largestLeaf: PageLevel = .page1G, log: ModificationLog? = nil, vcpu: UInt8 = 0xff
    ) {
        self.memory = memory
        self.pointer = pointer
        self.log = log
        self.vcpu = vcpu
        processor = EPTProcessor(
            physicalAddressBits: physicalAddressBits, executeOnly: executeOnly, largestLeaf: largestLeaf)
    }

    /// Whether the processor sets A and D: EPTP bit 6.
    public var accessDirty: Bool { pointer & 1 << 6 != 0 }

    /// The root table's level: 4 or 5.
    public var rootLevel: PageLevel { PageLevel(UInt8(truncatingIfNeeded: pointer >> 3 & 7) + 1) }

    /// What VM entry checks: memory type UC or WB, 4 or 5 levels, no reserved bit. Supervisor shadow stack (bit 7) is
    /// not offered. With a pointer that fails, no guest could run; a walk reports a misconfiguration.
    public var isPointerValid: Bool {
        let memoryType = pointer & 7
        let levels = pointer >> 3 & 7
        return (memoryType == 0 || memoryType == 6) && (levels == 3 || levels == 4)
            && pointer & (0xf80 | processor.reservedAddressBits | 0xfff << 52) == 0
    }

    /// Translates one access and sets A and D as the processor does.
    ///
    /// A guest address above what the levels translate (48 or 57 bits) is an EPT violation. Rights are judged when the
    /// leaf is reached, so a misconfigured entry below a read-only one is reported as such.
    public func walk(_ address: GuestAddress, _ access: AccessKind) -> WalkResult {
        guard isPointerValid else {
            return .misconfiguration(WalkFault(.rootPointer, address, access, level: rootLevel))
        }
        guard address.value >> (12 + 9 * UInt64(rootLevel.rawValue)) == 0 else {
            return .violation(WalkFault(.addressWidth, address, access, level: rootLevel))
        }
        while true {
            if let result = walkOnce(address, access) { return result }
        }
    }

    /// One walk from the root; nil if an entry changed before A or D got into it.
    private func walkOnce(_ address: GuestAddress, _ access: AccessKind) -> WalkResult? {
        var table = pointer & 0x000f_ffff_ffff_f000
        var level = rootLevel
        var rights = WalkRights.all
        while true {
            let index = address.value >> (12 + 9 * UInt64(level.rawValue - 1)) & 511
            let location = table + 8 * index
            guard memory.exists(HostFrame(location >> pageShift)) else {
                return .misconfiguration(WalkFault(.noMemory, address, access, level: level))
            }
            let word = memory.word(at: location)
            let entry = EPTEntry(bits: word.loadRacing())
            rights = rights.intersection(entry.rights)
            func fault(_ reason: WalkFault.Reason) -> WalkFault {
                WalkFault(
                    reason: reason, address: address, access: access, level: level, entry: entry.bits,
                    present: entry.isPresent, rights: rights)
            }

            guard entry.isPresent else { return .violation(fault(.absent)) }
            let leaf = entry.isLeaf(at: level, largest: processor.largestLeaf)
            if let defect = entry.defect(at: level, leaf: leaf, processor) { return .misconfiguration(fault(defect)) }
            guard leaf else {
                guard setAccessed(word, entry) else { return nil }
                table = entry.address
                level = level.below
                continue
            }
            guard rights.allow(access) else { return .violation(fault(.rights)) }
            let frame = HostFrame((entry.address | address.value & (level.bytes - 1)) >> pageShift)
            guard memory.exists(frame) else { return .misconfiguration(fault(.noMemory)) }
            if mustLog(entry, access), let log, log.isFull { return .modificationLogFull }
            guard let dirty = setLeafFlags(word, entry, address, access, level) else { return nil }
            return .translated(Translation(frame: frame, level: level, rights: rights, dirty: dirty))
        }
    }

    /// Sets A in a table's entry, as the walk passes it. False if the entry has changed.
    private func setAccessed(_ word: AtomicWord, _ entry: EPTEntry) -> Bool {
        guard accessDirty, entry.bits & EPTEntry.accessed == 0 else { return true }
        return word.compareExchange(expected: entry.bits, desired: entry.bits | EPTEntry.accessed) == nil
    }

    /// Whether the access sets D where it was clear.
    private func mustLog(_ entry: EPTEntry, _ access: AccessKind) -> Bool {
        accessDirty && access == .write && entry.bits & EPTEntry.dirty == 0
    }

    /// Sets A, and D for a write, in the leaf; logs a D that was clear. Nil if the leaf has changed, else whether stores need no more walk.
    private func setLeafFlags(
        _ word: AtomicWord, _ entry: EPTEntry, _ address: GuestAddress, _ access: AccessKind, _ level: PageLevel
    ) -> Bool? {
        guard accessDirty else { return true }
        let wanted = entry.bits | EPTEntry.accessed | (access == .write ? EPTEntry.dirty : 0)
        if wanted != entry.bits {
            guard word.compareExchange(expected: entry.bits, desired: wanted) == nil else { return nil }
            if mustLog(entry, access), let log { log.append(address) }
            recordFlags(
                in: memory, address: address, leaf: HostFrame(entry.address >> pageShift), level: level,
                old: entry.bits, new: wanted, accessed: EPTEntry.accessed, dirty: EPTEntry.dirty, vcpu: vcpu)
        }
        return wanted & EPTEntry.dirty != 0
    }

    /// The exit qualification of an EPT violation. Bits 2:0 the access, 5:3 what the walked entries permit together,
    /// 7 a guest linear address is known, 8 the fault is on that address's final translation, not on the guest's own
    /// page tables. Accesses to those count as writes where EPT keeps A and D, and are reported as reads and writes.
    /// Spec: x86 0.3. A misconfiguration has none.
    public func exitQualification(
        of fault: WalkFault, linearAddress: Bool = true, finalTranslation: Bool = true
    ) -> UInt64 {
        var value: UInt64 =
            switch fault.access {
            case .read: 1 << 0
            case .write: 1 << 1
            case .execute: 1 << 2
            }
        if fault.rights.read { value |= 1 << 3 }
        if fault.rights.write { value |= 1 << 4 }
        if fault.rights.execute { value |= 1 << 5 }
        guard linearAddress else { return value }
        if !finalTranslation, accessDirty { value |= 0b11 }
        return value | 1 << 7 | (finalTranslation ? 1 << 8 : 0)
    }
}
