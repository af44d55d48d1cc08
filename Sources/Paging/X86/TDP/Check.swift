import Audit
import Frames
import GuestMemory
import HostMemory
import Synchronization
import Synchrony

/// The tables, checked against the rules, with nobody else running. Spec: x86 section 8.
extension TDPMMU {
    /// X18, X19, X22 to X27, X28, X29 over every entry of every root, X32, X34 and
    /// X35 of the roots, X17 of the vCPUs, X36, X41 and X42 over the sums; X40, X44 to X46 and X48 of each leaf.
    public func checkTables() -> [Finding] {
        var check = TableCheck(self)
        for root in allRoots { check.tree(root) }
        check.roots()
        if let nested {
            let shadowed = nested.checkWithSums()
            check.findings += shadowed.findings
            for level in 1...3 { check.leaves[level] += shadowed.leaves[level] }
        }
        check.possibleHugePages()
        check.largePageCounts()
        check.apicAccess()
        if !vm.countsLeaves(check.leaves) {
            check.findings.append(Finding(.x36, "a page count differs from the leaves"))
        }
        return check.findings
    }
}

struct TableCheck {
    let mmu: TDPMMU
    let bits: EntryBits
    let configuration: TDPConfiguration
    private let memory: PhysicalMemory
    var findings: [Finding] = []
    /// Leaves by level.
    var leaves = [0, 0, 0, 0, 0, 0]
    private var seen: [HostFrame] = []
    /// The role of the tree that is being looked at.
    private var tree = PageRole()

    init(_ mmu: TDPMMU) {
        self.mmu = mmu
        bits = mmu.bits
        configuration = mmu.configuration
        memory = mmu.vm.memory
    }

    mutating func tree(_ root: HostFrame) {
        tree = mmu.info(ofRoot: root).role
        table(root, PageLevel(configuration.levels), GuestFrame(0))
    }

    private mutating func table(_ table: HostFrame, _ level: PageLevel, _ base: GuestFrame) {
        let first = StageTwoEntry(memory.entry(0, of: table), EntryBits.field)
        first.forEachIndex(below: 512, notHolding: EntryBits.empty) { i in
            let value = first.following(i).peek()
            let guest = GuestFrame(base.number + UInt64(i) * level.frames)
            guard EntryBits.isPresent(value) else { return absent(value, guest) }
            present(value, guest)
            if EntryBits.isTable(value, level.rawValue) {
                link(value, level, guest, at: table.physicalAddress + UInt64(i) * 8)
            } else {
                leaves[Int(level.rawValue)] += 1
                leaf(value, level, guest)
            }
        }
    }

    private mutating func absent(_ value: UInt64, _ guest: GuestFrame) {
        if configuration.cachesMMIO, bits.isMMIO(value) { return mmio(value, guest) }
        if bits.isEPT, value & EntryBits.empty == 0 { report(.x24, "an entry does not suppress #VE", guest, value) }
        if value == EntryBits.frozen {
            report(.x28, "a reachable entry is frozen", guest, value)
        } else if value != EntryBits.empty {
            report(.x18, "an entry without the present bit is not empty", guest, value)
        }
    }

    /// X27 at rest: a marker of this generation stands where no slot is. Those of others nobody believes.
    private mutating func mmio(_ value: UInt64, _ guest: GuestFrame) {
        let vm = mmu.vm
        if bits.frame(ofMMIO: value) != guest { report(.x27, "an MMIO entry is for another frame", guest, value) }
        let now = vm.slotsGeneration(of: tree.space) & EntryBits.generationMask
        // A nested guest has no APIC access page, whatever the slots say.
        if EntryBits.generation(ofMMIO: value) == now, let slot = vm.slot(containing: guest, in: tree.space),
            !tree.isGuestMode || slot.id != APICAccessPage.slot
        {
            report(.x27, "a valid MMIO entry hides the memory of a slot", guest, value)
        }
    }

    private mutating func present(_ value: UInt64, _ guest: GuestFrame) {
        if bits.isEPT, value & EntryBits.empty == 0 { report(.x24, "an entry does not suppress #VE", guest, value) }
    }

    // MARK: Links

    private mutating func link(_ value: UInt64, _ level: PageLevel, _ guest: GuestFrame, at address: UInt64) {
        let child = EntryBits.field.frame(in: value)
        if !bits.isProperLink(value, adDisabled: tree.accessDirtyDisabled) {
            report(.x23, "a link to a table has bits that it may not have", guest, value)
        }
        if seen.contains(child) {
            report(.x29, "a table hangs from two entries", guest, value)
            return
        }
        seen.append(child)
        let info = TableInfo(mmu.vm.host.tableWords(child))
        if info.parent != address || info.base != guest || info.role != childRole(below: level) {
            report(.x29, "a table does not know the entry that it hangs from", guest, value)
        }
        table(child, level.below, guest)
    }

    /// All of the root's but the level; that the root itself is invalid its children don't know.
    private func childRole(below level: PageLevel) -> PageRole {
        var role = tree
        role.level = level.rawValue - 1
        role.isInvalid = false
        return role
    }

    // MARK: Leaves

    private mutating func leaf(_ value: UInt64, _ level: PageLevel, _ guest: GuestFrame) {
        let breaches = bits.breaches(
            ofLeaf: value, level.rawValue, adType: mmu.adType(tree), nxHugePages: mmu.nxHugePages)
        for (invariant, reason) in breaches { report(invariant, reason, guest, value) }
        if !EntryBits.field.frame(in: value).isAligned(to: level) {
            report(.x22, "a huge leaf's frame is not a multiple of its size", guest, value)
        } else if isReserved(value, level) {
            report(.x23, "a leaf has bits that it may not have", guest, value)
        }
        if level == .page4K, !tree.isInvalid { logged(value, guest) }
        if !tree.isInvalid, value & (EntryBits.write | bits.mmuWritable) != 0,
            let slot = mmu.vm.slot(containing: guest, in: tree.space), let tracked = mmu.trackedFrames(of: slot),
            tracked.anyTracked(guest..<GuestFrame(guest.number + level.frames))
        {
            report(.x48, "a tracked frame can be written", guest, value)
        } else if !tree.isInvalid, value & (EntryBits.write | bits.mmuWritable) != 0, let nested = mmu.nested,
            nested.forbidsWrites(guest..<GuestFrame(guest.number + level.frames), in: tree.space)
        {
            report(.x48, "a guest hypervisor can write a table that is shadowed and in sync", guest, value)
        }
    }

    /// What the guest can write, or has written, unseen is in the log, or on its way there. Of a tree where the processor
    /// logs (X45), of a nested guest's beside such (X46), of all others (X44).
    private mutating func logged(_ value: UInt64, _ guest: GuestFrame) {
        let vm = mmu.vm
        let sign = mmu.seenBy(tree)
        guard value & sign != 0, !vm.logHasHoles, let slot = vm.slot(containing: guest, in: tree.space), slot.isLogged,
            !vm.isInDirtyLog(guest, of: slot)
        else { return }
        guard sign == bits.dirty else {
            let isNested = value & EntryBits.adType == EntryBits.writeProtectOnly
            return report(isNested ? .x46 : .x44, "a page can be written and is in no log", guest, value)
        }
        if !mmu.isInModificationLog(guest) { report(.x45, "a page was written and is in no log", guest, value) }
    }

    private func isReserved(_ value: UInt64, _ level: PageLevel) -> Bool {
        let tracked = bits.isAccessTracked(value)
        // KVM's leaves can be read, unless it has taken all rights away for a while.
        if value & 1 == 0 && !tracked { return true }
        if bits.isEPT {
            let type = value & EPT.memoryType
            if type != EPT.writeBack && type != EPT.uncached { return true }
        }
        return value & bits.meaningless != 0 || !memory.exists(EntryBits.field.frame(in: value))
            || bits.isReserved(
                value, level.rawValue, physicalAddressBits: configuration.physicalAddressBits,
                executeOnly: configuration.executeOnly)
    }

    // MARK: Roots

    /// X32: the MMU holds each valid root. X34: and each that is to be emptied. X35: a vCPU on an obsolete root has the request to leave it.
    mutating func roots() {
        for root in mmu.allRoots {
            let info = mmu.info(ofRoot: root)
            let holders = UInt64(mmu.vm.virtualCPUs.filter { $0.root == root }.count)
            // The zapper has inherited the MMU's own reference of a root that it has not emptied yet.
            if info.references < holders + (info.isInvalid && !info.isScheduled ? 0 : 1) {
                let invariant: Invariant = info.isScheduled ? .x34 : .x32
                findings.append(Finding(invariant, "a root has fewer references than holders", frame: root))
            }
        }
        for cpu in mmu.vm.virtualCPUs {
            guard let root = cpu.root, mmu.nested?.isInUse(by: cpu) != true else { continue }
            guard mmu.info(ofRoot: root).isInvalid, !cpu.hasRequest else { continue }
            findings.append(Finding(.x35, "a vCPU would enter the guest on an obsolete root", frame: root))
        }
    }

    /// X42: the list is as long as the count says, and holds tables that hang somewhere and are disallowed.
    mutating func possibleHugePages() {
        let list = mmu.possibleHugePages.list
        if list.count != mmu.vm.statistics.nx_lpage_splits.load(ordering: .relaxed) {
            findings.append(Finding(.x42, "the count of split huge pages is not that of their list"))
        }
        for possible in list {
            let table = possible.table
            let isRight =
                possible.isShadow
                ? mmu.nested?.isDisallowedPage(table) == true
                : TableInfo(mmu.vm.host.tableWords(table)).isDisallowed && seen.contains(table)
            if !isRight {
                findings.append(Finding(.x42, "a table is on the list that may be a huge page", frame: table))
            }
        }
    }

    /// X41: against a huge page speak its place in the slot, and each reason to track a frame in it.
    mutating func largePageCounts() {
        for slot in mmu.vm.activeSlots {
            guard let counts = slot.largePages else { continue }
            let edges = LargePageCounts(slot)
            let tracked = mmu.trackedFrames(of: slot)
            for level in [PageLevel.page2M, .page1G] {
                var block = slot.baseFrame.aligned(to: level)
                while block < slot.frames.upperBound {
                    let next = GuestFrame(block.number + level.frames)
                    let inside = max(block, slot.baseFrame)
                    var expected = edges.reasons(at: inside, level)
                    if let tracked {
                        for frame in inside.number..<min(next, slot.frames.upperBound).number {
                            expected += Int32(tracked.count(GuestFrame(frame)))
                        }
                    }
                    if let nested = mmu.nested {
                        let frames = inside..<min(next, slot.frames.upperBound)
                        expected += Int32(nested.countOfLowestTables(in: frames, space: slot.addressSpace))
                    }
                    if counts.reasons(at: inside, level) != expected {
                        findings.append(Finding(.x41, "the reasons against a huge page are miscounted", guest: block))
                    }
                    block = next
                }
            }
        }
    }

    mutating func report(
        _ invariant: Invariant, _ reason: StaticReason, _ guest: GuestFrame, _ value: UInt64
    ) {
        findings.append(Finding(invariant, reason, frame: EntryBits.field.frame(in: value), guest: guest))
    }
}
