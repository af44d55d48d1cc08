import Audit
import Frames
import GuestMemory
import HostMemory
import Synchronization
import Synchrony

/// The shadow pages, checked against the rules, with nobody else running. Spec: x86 section 8.
extension ShadowMMU {
    /// Every entry: X18, X19, X22, X23, X27, X38, X39, X44. Every page: X48 to X50, X52, X62. The sums: X36, X41, X42, X53,
    /// X55, X61. The vCPUs of direct tables: X35.
    public func checkTables() -> [Finding] { checkWithSums().findings }

    /// Of the sums that these tables have in common with others, `base` checks the whole: it gets the leaves by level.
    func checkWithSums() -> (findings: [Finding], leaves: [Int]) {
        guard knowsSlots else { return ([], [0, 0, 0, 0]) }
        var check = ShadowCheck(self)
        check.checkPages()
        check.checkCounts()
        check.checkSlots()
        if direct != nil { check.checkDirect() }
        check.findings += checkRoots()
        return (check.findings, check.leaves)
    }

    /// Whether a table in `frames` is shadowed and must not be written: it is in sync. For checks.
    func forbidsWrites(_ frames: Range<GuestFrame>, in space: UInt8) -> Bool {
        var found = false
        forEachTable(in: frames, space) { if !isObsolete($0), !$0.isUnsync { found = true } }
        return found
    }

    /// Lowest tables that are shadowed in `frames`. For checks.
    func countOfLowestTables(in frames: Range<GuestFrame>, space: UInt8) -> Int {
        var count = 0
        forEachTable(in: frames, space) { if !$0.role.isInvalid, $0.role.level == 1 { count += 1 } }
        return count
    }

    /// Calls `body` for each page that shadows a guest table in `frames`.
    private func forEachTable(in frames: Range<GuestFrame>, _ space: UInt8, _ body: (ShadowPage) -> Void) {
        index.forEachPage(in: frames) { if $0.role.space == space, $0.role.shadowsEntries { body($0) } }
    }
}

private struct ShadowCheck {
    let mmu: ShadowMMU
    var findings: [Finding] = []
    /// Every page there is, by its table.
    private var pages: [ShadowPage] = []
    /// By level.
    private(set) var leaves = [0, 0, 0, 0]
    private var links = 0

    init(_ mmu: ShadowMMU) {
        self.mmu = mmu
        mmu.index.forEachPage { pages.append($0) }
        pages.sort { $0.table.number < $1.table.number }
    }

    private func page(of table: HostFrame) -> ShadowPage? {
        var low = 0
        var high = pages.count
        while low < high {
            let middle = (low + high) / 2
            if pages[middle].table.number < table.number { low = middle + 1 } else { high = middle }
        }
        return low < pages.count && pages[low].table == table ? pages[low] : nil
    }

    private mutating func report(_ invariant: Invariant, _ reason: StaticReason, _ page: ShadowPage) {
        findings.append(Finding(invariant, reason, frame: page.table, guest: page.frame))
    }

    // MARK: Pages

    mutating func checkPages() {
        for page in pages {
            checkEntries(page)
            checkLife(page)
            checkParents(page)
            checkSynchrony(page)
        }
    }

    /// X52, X62, and the states of 11.2: a page is active, or somebody's zapped root.
    private mutating func checkLife(_ page: ShadowPage) {
        guard !page.role.isInvalid else {
            if page.isActive || page.rootCount == 0 { report(.x61, "a zapped page is still in use", page) }
            return
        }
        if !page.isActive { report(.x61, "a page is on no list", page) }
        if page.generation != mmu.generation || mmu.generation > 1 {
            report(.x62, "a page of an earlier generation is not zapped", page)
            return
        }
        var twins = 0
        mmu.index.forEach(near: page.frame) {
            if $0.frame == page.frame, $0.role == page.role, !mmu.isObsolete($0) { twins += 1 }
            return true
        }
        if twins != 1 { report(.x52, "a guest table has two pages of one role", page) }
    }

    /// X53: who a page knows of points to it. That these are all, the sums tell.
    private mutating func checkParents(_ page: ShadowPage) {
        for place in page.parents {
            let (table, index) = (EntryPlace(place).table, EntryPlace(place).index)
            guard let parent = self.page(of: table) else {
                report(.x53, "a parent's table is no page's", page)
                continue
            }
            let value = mmu.entry(parent, index).peek()
            guard EntryBits.isTable(value, parent.role.level), EntryBits.field.frame(in: value) == page.table,
                parent.role.level == page.role.level + 1
            else {
                report(.x53, "a page knows a parent that does not point to it", page)
                continue
            }
            if page.isUnsync || page.unsyncChildren > 0, !parent.hasUnsyncChild(index) {
                report(.x50, "an entry on the way to an unsync page is not marked", page)
            }
        }
        let sorted = page.parents.sorted()
        if zip(sorted, sorted.dropFirst()).contains(where: ==) { report(.x53, "a page knows a parent twice", page) }
        var marks = 0
        var next = 0
        while let i = page.unsyncChild(from: next) {
            marks += 1
            next = i + 1
        }
        if marks != page.unsyncChildren { report(.x50, "the count of marked entries is wrong", page) }
    }

    /// X48, X49.
    private mutating func checkSynchrony(_ page: ShadowPage) {
        if page.isUnsync, page.role.level != 1 || !page.role.shadowsEntries {
            report(.x49, "a page is unsync that is not a lowest table's", page)
        }
        guard page.role.shadowsEntries, !mmu.isObsolete(page), !page.isUnsync else { return }
        guard let slot = mmu.slot(page.frame, page.role) else { return }
        for level in [PageLevel.page4K, .page2M, .page1G] {
            for place in mmu.reverseMap(slot).entries(page.frame, level)
            where mmu.entry(at: place).peek() & (EntryBits.write | mmu.bits.mmuWritable) != 0 {
                report(.x48, "the guest can write a table that is in sync", page)
            }
        }
    }

    // MARK: Entries

    private mutating func checkEntries(_ page: ShadowPage) {
        mmu.entry(page, 0).forEachIndex(below: 512, notHolding: EntryBits.empty) { i in
            let value = mmu.entry(page, i).peek()
            let level = page.role.level
            if let direct = mmu.direct, direct.cachesMMIO, mmu.bits.isMMIO(value) {
                mmio(value, page, i)
            } else if !EntryBits.isPresent(value) {
                report(.x18, "an entry without the present bit is not empty", page)
            } else if EntryBits.isTable(value, level) {
                links += 1
                link(value, page, i)
            } else if level > 3 {
                report(.x23, "a leaf above 1 GiB", page)
            } else {
                leaves[Int(level)] += 1
                leaf(value, page, i)
            }
        }
    }

    /// X27 at rest: a marker of this generation stands where no slot is. Those of others nobody believes.
    private mutating func mmio(_ value: UInt64, _ page: ShadowPage, _ index: Int) {
        let guest = page.guestFrame(of: index)
        if mmu.bits.frame(ofMMIO: value) != guest || page.role.level > 1 {
            report(.x27, "an MMIO entry is for another frame", page)
        }
        let now = mmu.vm.slotsGeneration(of: page.role.space) & EntryBits.generationMask
        if EntryBits.generation(ofMMIO: value) == now, mmu.slot(guest, page.role) != nil {
            report(.x27, "a valid MMIO entry hides the memory of a slot", page)
        }
    }

    private mutating func link(_ value: UInt64, _ page: ShadowPage, _ index: Int) {
        if !mmu.bits.isProperLink(value, adDisabled: page.role.accessDirtyDisabled) {
            report(.x23, "a link to a table has bits that it may not have", page)
        }
        guard let child = self.page(of: EntryBits.field.frame(in: value)) else {
            report(.x53, "an entry points to a table that is no page's", page)
            return
        }
        if !child.parents.contains(page.place(of: index)) {
            report(.x53, "an entry points to a page that does not know it", page)
        }
        if mmu.isObsolete(child) { report(.x62, "an entry points to a page that is zapped", page) }
    }

    private mutating func leaf(_ value: UInt64, _ page: ShadowPage, _ index: Int) {
        let bits = mmu.bits
        let breaches = bits.breaches(
            ofLeaf: value, page.role.level, adType: mmu.adType(page.role), nxHugePages: mmu.nxHugePages)
        for (invariant, reason) in breaches { report(invariant, reason, page) }
        let frame = EntryBits.field.frame(in: value)
        if !frame.isAligned(to: page.level) { report(.x22, "a huge leaf's frame is not a multiple of its size", page) }
        if isReserved(value, page.role.level) || value & bits.present != bits.present || !mmu.vm.memory.exists(frame) {
            report(.x23, "a leaf has bits that it may not have", page)
        }
        let guest = page.guestFrame(of: index)
        guard let slot = mmu.slot(guest, page.role) else {
            report(.x53, "a leaf maps a frame of no slot", page)
            return
        }
        place(value, page, guest, slot)
        if mmu.reverseMap(slot).entries(guest, page.level).filter({ $0 == page.place(of: index) }).count != 1 {
            report(.x53, "a leaf is not in the reverse map of its frame", page)
        }
    }

    private func isReserved(_ value: UInt64, _ level: UInt8) -> Bool {
        let bits = mmu.bits
        let own = mmu.vm.policy.kind == .tracked ? ShadowMMU.counted : 0
        let value = value & ~own
        guard let configuration = mmu.configuration else {
            let known =
                EntryBits.frameMask | EntryBits.mmuPresent | EntryBits.write | bits.present | bits.user | bits.noExecute
                | bits.accessed | bits.dirty | bits.hostWritable | bits.mmuWritable | (level > 1 ? EntryBits.large : 0)
            return value & ~known != 0
        }
        return value & bits.meaningless & ~EntryBits.adType != 0
            || bits.isReserved(
                value, level, physicalAddressBits: configuration.physicalAddressBits,
                executeOnly: configuration.executeOnly)
    }

    /// X38, X39, X44: what the slot permits. That the process maps as much is for who knows the process.
    private mutating func place(_ value: UInt64, _ page: ShadowPage, _ guest: GuestFrame, _ slot: MemorySlot) {
        let isHuge = page.level > .page4K
        if isHuge, !slot.allowsHugeLeaf(at: guest, page.level) {
            report(.x38, "a huge leaf does not lie in its slot, congruent", page)
        }
        guard slot.isLogged, value & EntryBits.write != 0 else { return }
        if isHuge, !mmu.vm.manualProtect.initiallySet {
            report(.x39, "a huge leaf of a logged slot is writable", page)
        }
        if !mmu.vm.logHasHoles, !mmu.vm.isInDirtyLog(guest, of: slot) {
            report(.x44, "a page of a logged slot is writable and not in the log", page)
        }
    }

    // MARK: Direct tables

    /// X35: a vCPU on an obsolete root has the request to leave it. X42: the list is as long as the count says, and holds
    /// pages that are in use and disallowed.
    mutating func checkDirect() {
        for cpu in mmu.vm.virtualCPUs {
            guard let root = mmu.state(of: cpu).root else { continue }
            if mmu.isObsolete(root.page), !cpu.hasRequest {
                report(.x35, "a vCPU would enter the guest on an obsolete root", root.page)
            }
        }
        let list = mmu.possibleHugePages.list
        if list.count != mmu.vm.statistics.nx_lpage_splits.load(ordering: .relaxed) {
            findings.append(Finding(.x42, "the count of split huge pages is not that of their list"))
        }
        for possible in list where !possible.isShadow || !mmu.isDisallowedPage(possible.table) {
            findings.append(Finding(.x42, "a table is on the list that may be a huge page", frame: possible.table))
        }
        for page in pages where page.role.isInvalid == false && !page.role.isDirect {
            report(.x52, "a page shadows a guest's table where the processor reads it itself", page)
        }
    }

    // MARK: Sums

    /// X36, X53, X55, X61.
    mutating func checkCounts() {
        if mmu.base == nil, !mmu.vm.countsLeaves(leaves) {
            findings.append(Finding(.x36, "a page count differs from the leaves"))
        }
        if pages.reduce(0, { $0 + $1.parents.count }) != links {
            findings.append(Finding(.x53, "pages know more or fewer parents than there are"))
        }
        if mmu.indirectPages != pages.filter({ $0.role.shadowsEntries && !$0.role.isInvalid }).count {
            findings.append(Finding(.x55, "the count of pages that shadow guest entries is wrong"))
        }
        if mmu.usedPages != pages.count { findings.append(Finding(.x61, "the count of pages is wrong")) }
        if mmu.usedPages > mmu.limit + ShadowMMU.tablesPerFault {
            findings.append(Finding(.x61, "there are more pages than allowed"))
        }
    }

    /// X41 and X53 of every slot.
    mutating func checkSlots() {
        var mapped = 0
        for slot in mmu.vm.activeSlots where slot.extra != nil {
            mapped += mmu.reverseMap(slot).count
            checkTracking(slot)
            for level in [PageLevel.page2M, .page1G] {
                var frame = slot.baseFrame
                while mmu.base == nil, frame < slot.frames.upperBound {
                    checkReasons(slot, frame, level)
                    frame = GuestFrame(frame.aligned(to: level).number + level.frames)
                }
            }
        }
        if mapped != leaves[1] + leaves[2] + leaves[3] {
            findings.append(Finding(.x53, "the reverse maps hold more or fewer entries than there are leaves"))
        }
    }

    private func tables(in frames: Range<GuestFrame>, of slot: MemorySlot) -> [ShadowPage] {
        pages.filter {
            $0.role.shadowsEntries && !$0.role.isInvalid && $0.role.space == slot.addressSpace
                && frames.contains($0.frame)
        }
    }

    private mutating func checkTracking(_ slot: MemorySlot) {
        var expected = 0
        var tracked = 0
        // A frame may be tracked for other reasons as well.
        let isAll = mmu.base?.configuration.tracksWrites != true
        for page in tables(in: slot.frames, of: slot) where page.role.level > 1 {
            expected += 1
            if !mmu.reverseMap(slot).isTracked(page.frame) { report(.x41, "a guest table is not tracked", page) }
        }
        for number in slot.baseFrame.number..<slot.frames.upperBound.number {
            tracked += Int(mmu.reverseMap(slot).count(GuestFrame(number)))
        }
        if isAll ? tracked != expected : tracked < expected {
            findings.append(Finding(.x41, "frames are tracked that are no tables", guest: slot.baseFrame))
        }
    }

    private mutating func checkReasons(_ slot: MemorySlot, _ frame: GuestFrame, _ level: PageLevel) {
        guard let counts = slot.largePages else { return }
        let first = frame.aligned(to: level)
        let block = first..<GuestFrame(first.number + level.frames)
        let (all, edges) = counts.reasons(frame, level, in: slot)
        let shadowed = tables(in: block, of: slot).filter { slot.frames.contains($0.frame) }.count
        if all != edges + shadowed {
            findings.append(Finding(.x41, "the reasons against a huge page are counted wrong", guest: frame))
        }
    }
}
