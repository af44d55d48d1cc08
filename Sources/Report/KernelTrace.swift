import Audit
import Frames
import Machine
import Paging

/// The events of a run on x86 as the kernel's tracepoints tell of them, in the kernel's order. Spec: x86 section 10.
///
/// What the model does at once the kernel tells in several lines: an install by the TDP MMU is asked for, changes the
/// entry, and is told again with its place. Where an entry lies follows from the links told before.
struct KernelTrace {
    let isShadow: Bool
    /// EPT tables of the shadow MMU's: its events, and the TDP MMU's exits.
    let isLegacy: Bool
    /// Tables by the level and the first guest frame that they translate.
    private var tables: [UInt64: UInt64] = [:]
    /// The last fault of each vCPU.
    private var faults: [UInt8: Event] = [:]
    /// Tables that the TDP MMU has linked in a fault: the kernel tells what is asked for before.
    private var linked: [KernelEvent] = []
    private var isInFault = false
    /// Asynchronous faults begun, by vCPU; and the tokens of those underway, by vCPU and frame.
    private var tokenCounts: [UInt8: UInt64] = [:]
    private var tokens: [UInt64: UInt64] = [:]

    init(_ architecture: Architecture) {
        isShadow = architecture == .x86Shadow
        isLegacy = architecture == .x86TDPLegacy
    }

    /// Whether the architecture's entries have tracepoints at all.
    static func hasEntryEvents(_ architecture: Architecture) -> Bool {
        ArchitectureSet.x86.contains(architecture)
    }

    /// What the kernel prints of an event: nothing, or some lines.
    mutating func lines(_ event: Event) -> [KernelEvent] {
        switch event.kind {
        case .fault: isInFault = true
        case .faultResolved: isInFault = false
        default: break
        }
        var found = own(event)
        guard !linked.isEmpty else { return found }
        if isInFault, event.kind == .tableLinked {
            return []
        } else if event.kind == .entryInstalled {
            found.insert(contentsOf: linked, at: 1)
        } else if !found.isEmpty || !isInFault {
            found = linked + found
        } else {
            return []
        }
        linked = []
        return found
    }

    private mutating func own(_ event: Event) -> [KernelEvent] {
        switch event.kind {
        case .notifierStart:
            return [.unmapRange(event.guest << pageShift, (event.guest + event.value) << pageShift)]
        case .hostAged:
            let start = event.guest << pageShift
            return event.extra == 1 ? [.testAge(start)] : [.ageRange(start, start + event.value << pageShift)]
        case .fault: return fault(event)
        case .fastFault: return fastFault(event)
        case .mmioMarked:
            return [
                .markMMIO(
                    at: place(event.frame, event.guest, 1), event.guest, access: event.value & 7,
                    generation: event.extra)
            ]
        case .mmioChecked: return checkedMMIO(event)
        case .ringPushed, .ringReset, .ringExit: return ring(event)
        case .asyncTried, .asyncNotPresent, .asyncRepeated, .asyncCompleted, .asyncReady: return async(event)
        default: return isShadow || isLegacy ? shadow(event) : twoStage(event)
        }
    }

    private func place(_ table: UInt64, _ frame: UInt64, _ level: UInt8) -> UInt64 {
        table << pageShift | (frame >> (9 * UInt64(level - 1)) & 511) * 8
    }

    // MARK: Faults

    private mutating func fault(_ event: Event) -> [KernelEvent] {
        faults[event.task] = event
        // An EPT misconfiguration is another exit.
        guard isShadow || event.level & 8 == 0 else { return [] }
        let code = isShadow ? errorCode(event) : qualification(event)
        return [.pageFault(vcpu: event.extra, address: event.guest << pageShift, errorCode: code)]
    }

    /// PFERR bits.
    private func errorCode(_ event: Event) -> UInt64 {
        UInt64(event.level) | (event.value == 1 ? 2 : 0) | (event.value == 2 ? 16 : 0)
    }

    /// The exit qualification of an EPT violation: bit 0 read, 1 write, 2 fetch; 3 and 5 what a present entry still
    /// permits, for all of the model's do; 7 and 8 the address of an access itself.
    private func qualification(_ event: Event) -> UInt64 {
        1 << event.value | (event.level & 1 != 0 ? 0x28 : 0) | 0x180
    }

    private func fastFault(_ event: Event) -> [KernelEvent] {
        let level = event.level & 15
        let last = faults[event.task]
        // q0 becomes U, q1 W, q2 F, and any right P. Spec: x86 0.3.
        let access: UInt64 = [4, 2, 16][Int(min(last?.value ?? 1, 2))]
        return [
            .fastPageFault(
                vcpu: UInt64(event.task), address: event.guest << pageShift,
                code: access | UInt64((last?.level ?? 1) & 1), place: place(event.frame, event.guest, level),
                old: event.extra, new: event.value, result: UInt64(event.level >> 4))
        ]
    }

    private func checkedMMIO(_ event: Event) -> [KernelEvent] {
        let now = event.extra & EntryBits.generationMask
        let then = EntryBits.generation(ofMMIO: event.value)
        let isValid = now == then && event.extra >> 63 == 0
        let check = KernelEvent.checkMMIO(event.value, now: now, then: then, isValid: isValid)
        // The address of a direct fault is not told.
        return isValid ? [check, .handleMMIO(address: 0, event.guest, access: event.value & 7)] : [check]
    }

    // MARK: The TDP MMU

    private mutating func twoStage(_ event: Event) -> [KernelEvent] {
        let change = KernelEvent.entryChanged(event.guest, level: event.level, old: event.extra, new: event.value)
        switch event.kind {
        case .entryInstalled:
            let size = UInt64(1) << (9 * UInt64(event.level - 1))
            let table = tables[key(event.level, event.guest)] ?? 0
            return [
                .entryRequested(event.guest & ~(size - 1), event.frame & ~(size - 1), level: event.level), change,
                .entrySet(
                    event.guest & ~(size - 1), event.value, level: event.level,
                    at: place(table, event.guest, event.level), execute: event.value & 4 != 0,
                    user: event.value & 1 != 0),
            ]
        case .entryZapped, .entryChanged: return [change]
        case .tableRemoved: return [change]
        case .tableLinked:
            let lines = link(event, change)
            guard isInFault else { return lines }
            linked += lines
            return []
        default: return []
        }
    }

    /// A table is made, and linked; over a huge leaf it is a split.
    private mutating func link(_ event: Event, _ change: KernelEvent) -> [KernelEvent] {
        let child = event.level - 1
        let base = event.guest & ~((UInt64(1) << (9 * UInt64(child))) - 1)
        tables[key(child, base)] = event.frame
        var role = PageRole.tdpRoot(levels: child, accessDirty: true)
        role.level = child
        let made = KernelEvent.pageTaken(.init(frame: base, role: role), isNew: true)
        let isSplit = event.level > 1 && EntryBits.isLeaf(event.extra, event.level)
        return isSplit ? [made, change, .split(event.guest, event.extra, level: event.level)] : [made, change]
    }

    private func key(_ level: UInt8, _ frame: UInt64) -> UInt64 {
        UInt64(level) << 56 | frame >> (9 * UInt64(level))
    }

    // MARK: The shadow MMU

    private func shadow(_ event: Event) -> [KernelEvent] {
        switch event.kind {
        case .entryRequested: return [.entryRequested(event.guest, event.frame, level: event.level)]
        case .entrySet:
            return [
                .entrySet(
                    event.guest, event.value, level: event.level, at: event.extra,
                    execute: isLegacy ? event.value & 4 != 0 : event.value >> 63 == 0,
                    user: event.value & (isLegacy ? 1 : 4) != 0)
            ]
        case .guestWalk: return [.tableWalk(event.guest, code: event.value)]
        case .guestEntryRead: return [.walkedElement(event.value, level: event.level)]
        case .guestAccessedSet: return [.setAccessed(at: event.guest)]
        case .guestDirtySet: return [.setDirty(at: event.guest)]
        case .guestWalkFailed: return [.walkerError(code: event.value)]
        case .zapAllFast: return [.zapAllFast(generation: event.value, pages: event.extra)]
        case .shadowPageTaken: return [.pageTaken(page(event), isNew: event.extra >> 33 & 1 != 0)]
        case .shadowPageZapped: return [.pageZapped(page(event))]
        case .shadowPageSynced: return [.pageSynced(page(event))]
        case .shadowPageUnsynced: return [.pageUnsynced(page(event))]
        default: return []
        }
    }

    private func page(_ event: Event) -> KernelEvent.Page {
        KernelEvent.Page(
            generation: event.extra >> 34, frame: event.guest,
            role: PageRole(rawValue: UInt32(truncatingIfNeeded: event.value)), roots: event.extra & 0xffff_ffff,
            isUnsync: event.extra >> 32 & 1 != 0)
    }

    // MARK: Rings and asynchronous faults

    private func ring(_ event: Event) -> [KernelEvent] {
        let cpu = UInt64(event.task)
        let (pushed, consumed) = (UInt32(truncatingIfNeeded: event.value), UInt32(event.value >> 32))
        switch event.kind {
        case .ringPushed:
            return [.ringPush(cpu, dirty: pushed, reset: consumed, slot: event.extra, offset: event.guest)]
        case .ringReset: return [.ringReset(cpu, dirty: pushed, reset: consumed)]
        default: return [.ringExit(vcpu: cpu)]
        }
    }

    private mutating func async(_ event: Event) -> [KernelEvent] {
        let address = event.guest << pageShift
        let key = UInt64(event.task) << 56 | event.guest
        switch event.kind {
        case .asyncTried: return [.asyncTried(address, event.guest)]
        case .asyncRepeated: return [.asyncRepeated(address, event.guest)]
        case .asyncNotPresent:
            // Kernel: `alloc_apf_token`: a count, and the vCPU's number in the low 12 bits. Linux skips the id 0.
            let count = (tokenCounts[event.task] ?? 0) + 1
            tokenCounts[event.task] = count
            let token = count << 12 | UInt64(event.task)
            tokens[key] = token
            return [.asyncNotPresent(token: token, address)]
        case .asyncCompleted: return [.asyncCompleted(address, user: event.value)]
        default: return [.asyncReady(token: tokens.removeValue(forKey: key) ?? 0, address)]
        }
    }
}
