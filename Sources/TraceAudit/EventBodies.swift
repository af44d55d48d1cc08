/// The tracepoints that the auditor reads. Spec: x86 10.
package enum EventKind: String, CaseIterable, Sendable {
    case pageFault = "kvm_page_fault"
    case fastPageFault = "fast_page_fault"
    case entryRequested = "kvm_mmu_spte_requested"
    case entrySet = "kvm_mmu_set_spte"
    case entryChanged = "kvm_tdp_mmu_spte_changed"
    case splitHugePage = "kvm_mmu_split_huge_page"
    case getTable = "kvm_mmu_get_page"
    case zapTable = "kvm_mmu_prepare_zap_page"
    case syncTable = "kvm_mmu_sync_page"
    case unsyncTable = "kvm_mmu_unsync_page"
    case zapAllFast = "kvm_mmu_zap_all_fast"
    case markMMIO = "mark_mmio_spte"
    case checkMMIO = "check_mmio_spte"
    case handleMMIO = "handle_mmio_page_fault"
    case tableWalk = "kvm_mmu_pagetable_walk"
    case walkedElement = "kvm_mmu_paging_element"
    case setAccessed = "kvm_mmu_set_accessed_bit"
    case setDirty = "kvm_mmu_set_dirty_bit"
    case walkerError = "kvm_mmu_walker_error"
    case unmapRange = "kvm_unmap_hva_range"
    case ageRange = "kvm_age_hva"
    case testAge = "kvm_test_age_hva"
    case dirtyLogFull = "kvm_pml_full"
    case fastMMIO = "kvm_fast_mmio"
    case matchMMIO = "vcpu_match_mmio"
    case accessMMIO = "kvm_mmio"
    case ringPush = "kvm_dirty_ring_push"
    case ringReset = "kvm_dirty_ring_reset"
    case ringExit = "kvm_dirty_ring_exit"
    case asyncTry = "kvm_try_async_get_page"
    case asyncRepeated = "kvm_async_pf_repeated_fault"
    case asyncNotPresent = "kvm_async_pf_not_present"
    case asyncReady = "kvm_async_pf_ready"
    case asyncCompleted = "kvm_async_pf_completed"
    /// Not in the MMU's list, but the only sign that a guest access was interpreted instead of executed.
    case emulate = "kvm_emulate_insn"
    case mark = "tracing_mark_write"
    /// `trace-cmd report` shows a mark as `print: tracing_mark_write: ...`.
    case printed = "print"
}

/// `kvm_mmu_set_spte`: a leaf as it was just written. `at` is the entry's host physical address.
package struct EntrySet: Equatable, Sendable {
    package var frame: UInt64
    package var entry: UInt64
    package var level: Int
    package var at: UInt64
    /// The printed permissions: bit 0 w, bit 1 x, bit 2 u; nil where u is not printed.
    package var printedWrite: Bool
    package var printedExecute: Bool
    package var printedUser: Bool?
}

/// `kvm_mmu_spte_requested`: what a fault is about to install.
package struct EntryRequested: Equatable, Sendable {
    package var frame: UInt64
    package var hostFrame: UInt64
    package var level: Int
}

/// `kvm_tdp_mmu_spte_changed`: one successful write to a TDP-MMU entry.
package struct EntryChanged: Equatable, Sendable {
    package var addressSpace: Int
    package var frame: UInt64
    package var level: Int
    package var old: UInt64
    package var new: UInt64
}

/// The `<SP>` part of the shadow-page events.
package struct TableEvent: Equatable, Sendable {
    package var generation: UInt64
    package var frame: UInt64
    package var level: Int
    package var entryBytes: Int
    package var quadrant: Int
    package var direct: Bool
    package var access: Int
    package var invalid: Bool
    package var rootCount: UInt64
    package var unsync: Bool
    /// `new` or `existing` of `kvm_mmu_get_page`; nil in the other events.
    package var created: Bool?
}

package struct HostRange: Equatable, Sendable {
    package var start: UInt64
    package var end: UInt64
}

/// `fast_page_fault`.
package struct FastPageFault: Equatable, Sendable {
    package var address: UInt64
    package var old: UInt64
    package var new: UInt64
    package var spurious: Bool
    package var fixed: Bool
}

/// `check_mmio_spte`.
package struct MMIOCheck: Equatable, Sendable {
    package var entry: UInt64
    package var currentGeneration: UInt64
    package var entryGeneration: UInt64
    package var valid: Bool
}

/// The body of an understood event.
package enum EventBody: Equatable, Sendable {
    case pageFault(address: UInt64, errorCode: UInt64)
    case fastPageFault(FastPageFault)
    case entryRequested(EntryRequested)
    case entrySet(EntrySet)
    case entryChanged(EntryChanged)
    case splitHugePage(frame: UInt64, level: Int, errno: Int64)
    case table(EventKind, TableEvent)
    /// A shadow page ended or changed, and which is not printed.
    case tableWithoutFrame(EventKind)
    case zapAllFast(generation: UInt64, pages: UInt64)
    case checkMMIO(MMIOCheck)
    case tableWalk(address: UInt64, errorCode: UInt64)
    case walkedElement(entry: UInt64, level: Int)
    /// A or D was set in an entry of the guest's, at this guest physical address.
    case setFlag(EventKind, at: UInt64)
    case walkerError(UInt64)
    case unmapRange(HostRange)
    case ageRange(HostRange)
    case testAge(UInt64)
    /// `firstByte` of the interpreted instruction, where it was printed.
    case emulate(firstByte: UInt8?)
    case mark(ProbeMark)
    /// Well-formed, and only counted.
    case counted(EventKind)
}

extension EventBody {
    /// Reads `body` as an event of `kind`; nil if it does not have that event's shape.
    static func parse(_ kind: EventKind, _ body: ByteCursor) -> EventBody? {
        var cursor = body
        switch kind {
        case .entrySet: return EntrySet(&cursor).map(EventBody.entrySet)
        case .entryRequested: return EntryRequested(&cursor).map(EventBody.entryRequested)
        case .tableWalk:
            guard let address = cursor.hexadecimal(after: "addr "),
                let code = cursor.hexadecimal(after: " pferr ")
            else { return nil }
            return .tableWalk(address: address, errorCode: code)
        case .walkedElement:
            guard let entry = cursor.hexadecimal(after: "pte "), let level = cursor.decimal(after: " level "),
                level <= 5
            else { return nil }
            return .walkedElement(entry: entry, level: Int(level))
        case .setAccessed, .setDirty: return cursor.hexadecimal(after: "gpa ").map { .setFlag(kind, at: $0) }
        case .walkerError: return cursor.hexadecimal(after: "pferr ").map(EventBody.walkerError)
        case .entryChanged: return EntryChanged(&cursor).map(EventBody.entryChanged)
        case .getTable, .zapTable, .syncTable, .unsyncTable:
            guard let table = TableEvent(&cursor), (kind == .getTable) == (table.created != nil) else {
                return kind != .getTable && TableEvent.isWithoutFrame(body) ? .tableWithoutFrame(kind) : nil
            }
            return .table(kind, table)
        case .unmapRange: return range(&cursor, after: "mmu notifier unmap range: ").map(EventBody.unmapRange)
        case .ageRange: return range(&cursor, after: "mmu notifier age hva: ").map(EventBody.ageRange)
        case .testAge: return cursor.hexadecimal(after: "mmu notifier test age hva: ").map(EventBody.testAge)
        case .pageFault: return pageFault(&cursor)
        case .fastPageFault: return FastPageFault(&cursor).map(EventBody.fastPageFault)
        case .splitHugePage: return splitHugePage(&cursor)
        case .zapAllFast:
            guard let generation = cursor.decimal(after: "kvm-mmu-valid-gen "),
                let pages = cursor.hexadecimal(after: " used_pages ")
            else { return nil }
            return .zapAllFast(generation: generation, pages: pages)
        case .checkMMIO: return MMIOCheck(&cursor).map(EventBody.checkMMIO)
        case .emulate: return .emulate(firstByte: firstInstructionByte(cursor))
        case .mark, .printed:
            _ = cursor.skip("tracing_mark_write: ")
            return .mark(ProbeMark(cursor))
        default: return isWellFormed(kind, cursor) ? .counted(kind) : nil
        }
    }

    private static func range(_ cursor: inout ByteCursor, after literal: StaticString) -> HostRange? {
        guard let start = cursor.hexadecimal(after: literal), let end = cursor.hexadecimal(after: " -- ") else {
            return nil
        }
        return HostRange(start: start, end: end)
    }

    /// Kernels before 6.3 print neither vcpu nor rip.
    private static func pageFault(_ cursor: inout ByteCursor) -> EventBody? {
        if cursor.starts(with: "vcpu ") {
            guard cursor.decimal(after: "vcpu ") != nil, cursor.hexadecimal(after: " rip ") != nil,
                cursor.skip(" ")
            else { return nil }
        }
        guard let address = cursor.hexadecimal(after: "address "),
            let code = cursor.hexadecimal(after: " error_code ")
        else { return nil }
        return .pageFault(address: address, errorCode: code)
    }

    private static func splitHugePage(_ cursor: inout ByteCursor) -> EventBody? {
        guard let frame = cursor.hexadecimal(after: "gfn "), cursor.hexadecimal(after: " spte ") != nil,
            let level = cursor.decimal(after: " level "), level <= 5, cursor.skip(" errno "),
            let errno = cursor.signedDecimal()
        else { return nil }
        return .splitHugePage(frame: frame, level: Int(level), errno: errno)
    }

    /// `<csbase>:<rip>:<bytes> (<mode>)`.
    private static func firstInstructionByte(_ body: ByteCursor) -> UInt8? {
        var cursor = body
        guard cursor.upTo(":") != nil, cursor.upTo(":") != nil else { return nil }
        // A blank stands here where libtraceevent's plugin printed it.
        cursor.skipSpaces()
        guard let byte = cursor.hexadecimal(), byte <= 0xff else { return nil }
        return UInt8(byte)
    }

    /// The events that are only counted: the first field must be there.
    private static func isWellFormed(_ kind: EventKind, _ body: ByteCursor) -> Bool {
        var cursor = body
        switch kind {
        case .markMMIO: return cursor.skip("sptep:") && cursor.upTo(" gfn ") != nil && cursor.hexadecimal() != nil
        case .handleMMIO: return cursor.hexadecimal(after: "addr:") != nil
        case .dirtyLogFull, .ringExit: return cursor.decimal(after: "vcpu ") != nil
        case .fastMMIO: return cursor.hexadecimal(after: "fast mmio at gpa ") != nil
        case .matchMMIO:
            return cursor.hexadecimal(after: "gva ") != nil && cursor.hexadecimal(after: " gpa ") != nil
        case .accessMMIO: return cursor.skip("mmio ")
        case .ringPush, .ringReset: return cursor.skip("ring ")
        case .asyncTry, .asyncRepeated: return cursor.hexadecimal(after: "gva = ") != nil
        case .asyncNotPresent, .asyncReady: return cursor.hexadecimal(after: "token ") != nil
        case .asyncCompleted: return cursor.hexadecimal(after: "gva ") != nil
        default: return true
        }
    }
}
