import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// What a fault's access asks of the guest's tables. Kernel: PFERR bits. Spec: x86 0.3.
public struct FaultCode: OptionSet, Sendable {
    public let rawValue: UInt64
    public init(rawValue: UInt64) { self.rawValue = rawValue }
    public static let present = FaultCode(rawValue: 1 << 0)
    public static let write = FaultCode(rawValue: 1 << 1)
    public static let user = FaultCode(rawValue: 1 << 2)
    public static let reserved = FaultCode(rawValue: 1 << 3)
    public static let fetch = FaultCode(rawValue: 1 << 4)
}

/// A page fault for the guest itself.
public struct GuestPageFault: Sendable, Equatable {
    public var address: UInt64
    public var code: FaultCode
    public init(address: UInt64, code: FaultCode) {
        self.address = address
        self.code = code
    }
}

/// A walk of the guest's tables that found a page. Levels count from 1; element `level - 1` is a level's.
/// Kernel: `struct guest_walker`. Spec: x86 4.6.
///
/// No tuples: of one that is read through `withUnsafeBytes(of:)` at the constant offset 0, Swift 6.3's dead store elimination
/// loses the contents in Embedded Swift.
struct GuestWalk {
    /// Of the leaf.
    var level: UInt8 = 0
    /// The entries as they were found, and where.
    private var entries = InlineArray<5, UInt64>(repeating: 0)
    private var places = InlineArray<5, UInt64>(repeating: 0)
    private var tables = InlineArray<5, UInt64>(repeating: 0)
    /// What the entries above a table permit together. Kernel: `pt_access`.
    private var tableRights = InlineArray<5, Rights>(repeating: [])
    /// What all of them permit, without W if the guest's page is clean and this is no write. Kernel: `pte_access`.
    var rights: Rights = []
    /// The very frame that is wanted, in a large page too.
    var frame = GuestFrame(0)
    /// The eight entries around that of level 1, when they were last read. Kernel: `prefetch_ptes`.
    var neighbours: [UInt64] = []
    /// Pages that had been made when an entry was last found unchanged. Spec: X54.
    var confirmedAt: UInt64 = 0

    init() {}

    /// No tables of the guest's count.
    init(of frame: GuestFrame, level: UInt8) {
        self.frame = frame
        self.level = level
        rights = .all
    }

    func entry(_ level: UInt8) -> UInt64 { entries[Int(level) - 1] }
    func place(_ level: UInt8) -> GuestAddress { GuestAddress(places[Int(level) - 1]) }
    func table(_ level: UInt8) -> GuestFrame { GuestFrame(tables[Int(level) - 1]) }
    func rights(ofTable level: UInt8) -> Rights { tableRights[Int(level) - 1] }

    fileprivate mutating func note(
        _ level: UInt8, table: GuestFrame, place: GuestAddress, entry: UInt64, _ above: Rights
    ) {
        let i = Int(level) - 1
        entries[i] = entry
        places[i] = place.value
        tables[i] = table.number
        tableRights[i] = above
    }
    fileprivate mutating func set(_ level: UInt8, entry: UInt64) { entries[Int(level) - 1] = entry }
}

/// Why a walk found nothing.
struct GuestWalkFailure {
    /// The guest's own fault.
    var pageFault: GuestPageFault
    /// What the entries above it permit together, as far as the walk came.
    var rights: Rights
    /// The guest hypervisor has a page-modification log, which is full.
    var logIsFull = false
}

enum GuestWalkResult {
    case page(GuestWalk)
    case fault(GuestWalkFailure)
}

/// Walking the guest's tables as its processor would. Caller: the vCPU's task, inside `withSlots`, no lock held.
/// Kernel: `FNAME(walk_addr)`.
extension ShadowMMU {
    /// - Parameter code: W, U and F of the access, and P as the processor reported it.
    func walkGuest(_ cpu: VirtualCPU, _ address: UInt64, _ code: FaultCode) -> GuestWalkResult {
        let state = state(of: cpu)
        guard state.format.isPaged else {
            return .page(GuestWalk(of: GuestFrame(address >> 12), level: largestDirectLevel))
        }
        note(Event(.guestWalk, guest: address, value: code.rawValue, task: task(cpu)))
        while true {
            switch walkOnce(cpu, state, address, code) {
            case .page(let walk): return .page(walk)
            case .fault(let failure):
                note(Event(.guestWalkFailed, guest: address, value: failure.pageFault.code.rawValue, task: task(cpu)))
                return .fault(failure)
            case .changed: continue
            }
        }
    }

    /// Where the emulator finds an address of the guest's: its instruction's, or, with an empty code, that of a structure
    /// which the processor would read itself. Nil: the guest's own fault. Caller as above. Kernel: `gva_to_gpa`.
    public func translate(_ cpu: VirtualCPU, _ address: UInt64, _ code: FaultCode) -> GuestAddress? {
        guard case .page(let walk) = walkGuest(cpu, address, code) else { return nil }
        return GuestAddress(walk.frame.address.value | address & (pageSize - 1))
    }

    private enum Step {
        case page(GuestWalk)
        case fault(GuestWalkFailure)
        /// An entry changed before A or D got into it.
        case changed
    }

    private func walkOnce(_ cpu: VirtualCPU, _ state: ShadowCPU, _ address: UInt64, _ code: FaultCode) -> Step {
        let format = state.format
        var walk = GuestWalk()
        var level = format.levels
        var above = Rights.all
        var next = format.top
        func fault(_ reason: FaultCode) -> Step {
            let found = code.intersection(format.reported).union(reason)
            return .fault(GuestWalkFailure(pageFault: GuestPageFault(address: address, code: found), rights: above))
        }

        // A nested guest's addresses beyond what its hypervisor's tables translate: there is no entry.
        if base != nil, level < 4, address >> 32 != 0 { return fault([]) }
        if level == 3 {
            let entry = pageDirectoryPointer(address, state, cpu)
            note(Event(.guestEntryRead, level: 3, value: entry, task: task(cpu)))
            guard format.isPresent(entry) else { return fault([]) }
            // Of those that came with CR3 the load has seen to it.
            if format.hasReservedBit(entry, 3) { return fault([.reserved, .present]) }
            next = entry & 0x000f_ffff_ffff_f000
            level = 2
        }
        while true {
            let table = GuestFrame(next >> 12)
            let place = GuestAddress(next + format.index(address, level) * format.entrySize)
            guard vm.isVisible(table, in: cpu.addressSpaceNumber),
                let entry = readEntry(cpu, place, format, atomically: false)
            else { return fault([]) }
            note(Event(.guestEntryRead, level: level, value: entry, task: task(cpu)))
            guard format.isPresent(entry) else {
                // Of EPT the entry says what it lacks.
                above = above.intersection(format.rights(entry))
                return fault([])
            }
            if format.hasReservedBit(entry, level) { return fault([.reserved, .present]) }
            walk.note(level, table: table, place: place, entry: entry, above)
            above = above.intersection(format.rights(entry))
            if format.isLeaf(entry, level) { break }
            next = format.frame(entry, level).address.value
            level -= 1
        }
        walk.level = level
        guard format.permits(code, above) else { return fault(.present) }
        let leaf = walk.entry(level)
        walk.frame = GuestFrame(
            format.frame(leaf, level).number + (address >> 12) & (format.pages(level) - 1))
        walk.rights = above
        if !code.contains(.write) { walk.rights = format.withoutWriteIfClean(above, leaf) }
        switch setFlags(cpu, &walk, address, format, write: code.contains(.write)) {
        case .set: return .page(walk)
        case .logIsFull:
            return .fault(
                GuestWalkFailure(
                    pageFault: GuestPageFault(address: address, code: code), rights: above, logIsFull: true))
        case .changed: return .changed
        case .failed: return fault([])
        }
    }

    private enum Flags {
        case set
        /// An entry is no longer as it was read.
        case changed
        /// The process may not write a table: to try again would be in vain.
        case failed
        /// The guest hypervisor's page-modification log has no room for the page.
        case logIsFull
    }

    /// Sets A on the way and D on the leaf, as the processor would.
    /// Kernel: `FNAME(update_accessed_dirty_bits)`.
    private func setFlags(
        _ cpu: VirtualCPU, _ walk: inout GuestWalk, _ address: UInt64, _ format: GuestEntryFormat, write: Bool
    ) -> Flags {
        guard format.accessed != 0 else { return .set }
        for level in (walk.level...format.topLevel).reversed() {
            let old = walk.entry(level)
            var new = old | format.accessed
            let place = walk.place(level)
            if new != old { note(Event(.guestAccessedSet, guest: place.value, level: level, task: task(cpu))) }
            if level == walk.level, write, old & format.dirty == 0 {
                guard logForHypervisor(cpu, GuestAddress(address)) else { return .logIsFull }
                note(Event(.guestDirtySet, guest: place.value, level: level, task: task(cpu)))
                new |= format.dirty
            }
            guard new != old else { continue }
            // Tables in a read-only slot stay as they are; the guest's processor could not write them either.
            guard let slot = cpu.slot(containing: place.frame), !slot.isInvalid, !slot.flags.readOnly else { continue }
            let wide = format.entrySize == 8
            do throws(Errno) {
                guard
                    try vm.addressSpace.compareExchange(
                        slot.userAddress(of: place.frame) + place.offset, wide: wide, expected: old, desired: new)
                else { return .changed }
            } catch { return .failed }
            vm.markDirty(place.frame, in: slot, by: cpu)
            walk.set(level, entry: new)
        }
        return .set
    }

    /// One entry of the guest's. Nil: it can't be read, or, `atomically`, not without waiting.
    func readEntry(
        _ cpu: VirtualCPU, _ place: GuestAddress, _ format: GuestEntryFormat, atomically: Bool
    ) -> UInt64? {
        var entry: UInt64 = 0
        let count = Int(format.entrySize)
        do throws(Errno) {
            try withUnsafeMutableBytes(of: &entry) { (bytes) throws(Errno) in
                let buffer = UnsafeMutableRawBufferPointer(rebasing: bytes[0..<count])
                if atomically {
                    try cpu.readGuestAtomically(place, into: buffer)
                } else {
                    try cpu.readGuest(place, into: buffer)
                }
            }
        } catch { return nil }
        return entry
    }

    /// Whether an entry is no longer as the walk found it; of level 1 its neighbours are read too, for the prefetch.
    /// Under mmu_lock. Kernel: `FNAME(gpte_changed)`. Spec: x86 4.5.
    func hasChanged(_ walk: inout GuestWalk, _ level: UInt8, _ cpu: VirtualCPU, _ format: GuestEntryFormat) -> Bool {
        walk.confirmedAt = pagesMade
        guard level == 1 else {
            return readEntry(cpu, walk.place(level), format, atomically: true) != walk.entry(level)
        }
        let size = format.entrySize
        let place = walk.place(1)
        let first = place.value & ~(size * 8 - 1)
        walk.neighbours = []
        for i in 0..<8 {
            guard let entry = readEntry(cpu, GuestAddress(first + UInt64(i) * size), format, atomically: true) else {
                return true
            }
            walk.neighbours.append(entry)
        }
        return walk.neighbours[Int((place.value - first) / size)] != walk.entry(1)
    }
}
