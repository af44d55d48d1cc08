import Audit
import Frames
import GuestMemory
import HostMemory
import Synchronization
import Synchrony

/// The tables, checked against the rules, with nobody else running. Spec: x86 section 8.
extension TDPMMU {
    /// X18, X19, X22, X23, X24, X28, X29 over every entry of every root, and X36 over the sums.
    public func checkTables() -> [Finding] {
        var check = TableCheck(memory: vm.memory, host: vm.host, accessDirty: accessDirty)
        for root in allRoots { check.table(root, PageLevel(4), GuestFrame(0)) }
        let counters = vm.statistics
        let agree =
            check.leaves[1] == counters.pages_4k.load(ordering: .relaxed)
            && check.leaves[2] == counters.pages_2m.load(ordering: .relaxed)
            && check.leaves[3] == counters.pages_1g.load(ordering: .relaxed)
        if !agree { check.findings.append(Finding(.x36, "a page count differs from the leaves")) }
        return check.findings
    }
}

private struct TableCheck {
    let memory: PhysicalMemory
    let host: Host
    let accessDirty: Bool
    var findings: [Finding] = []
    /// Leaves by level.
    var leaves = [0, 0, 0, 0, 0]
    private var seen: [HostFrame] = []

    init(memory: PhysicalMemory, host: Host, accessDirty: Bool) {
        self.memory = memory
        self.host = host
        self.accessDirty = accessDirty
    }

    mutating func table(_ table: HostFrame, _ level: PageLevel, _ base: GuestFrame) {
        let first = StageTwoEntry(memory.entry(0, of: table), EPT.field)
        first.forEachIndex(below: 512, notHolding: EPT.empty) { i in
            let value = first.following(i).peek()
            let guest = GuestFrame(base.number + UInt64(i) * level.frames)
            if value & EPT.suppressVE == 0 { report(.x24, "an entry does not suppress #VE", guest, value) }
            if value & EPT.mmuPresent == 0 {
                absent(value, guest)
            } else if EPTFormat().isTable(value, level.rawValue) {
                link(value, level, guest, at: table.physicalAddress + UInt64(i) * 8)
            } else {
                leaves[Int(level.rawValue)] += 1
                leaf(value, level, guest)
            }
        }
    }

    private mutating func absent(_ value: UInt64, _ guest: GuestFrame) {
        if value == EPT.frozen {
            report(.x28, "a reachable entry is frozen", guest, value)
        } else if value != EPT.empty {
            report(.x18, "an entry without the present bit is not empty", guest, value)
        }
    }

    private mutating func link(_ value: UInt64, _ level: PageLevel, _ guest: GuestFrame, at address: UInt64) {
        let child = EPT.field.frame(in: value)
        // A may be set or not: the processor's business.
        let expected = EPT.link(accessDirty: accessDirty) & ~EPT.accessed
        if value & ~(EPT.field.mask | EPT.accessed) != expected {
            report(.x23, "a link to a table has bits that it may not have", guest, value)
        }
        if seen.contains(child) {
            report(.x29, "a table hangs from two entries", guest, value)
            return
        }
        seen.append(child)
        let info = TableInfo(host.tableWords(child))
        if info.parent != address || info.level != level.below || info.base != guest {
            report(.x29, "a table does not know the entry that it hangs from", guest, value)
        }
        table(child, level.below, guest)
    }

    private mutating func leaf(_ value: UInt64, _ level: PageLevel, _ guest: GuestFrame) {
        let writable = value & EPT.write != 0
        let mmuWritable = value & EPT.mmuWritable != 0
        let hostWritable = value & EPT.hostWritable != 0
        if (writable && !mmuWritable) || (mmuWritable && !hostWritable) {
            report(.x19, "W, MW and HW do not go together", guest, value)
        }
        if !EPT.field.frame(in: value).isAligned(to: level) {
            report(.x22, "a huge leaf's frame is not a multiple of its size", guest, value)
        }
        let type = value & EPT.memoryType
        let rights = value & EPT.rights
        let tracked = EPT.isAccessTracked(value) && !accessDirty
        let legalRights = tracked || (rights & EPT.read != 0 && rights != 0)
        let undefined: UInt64 = 1 << 10 | 1 << 53 | 1 << 55 | 7 << 60
        if level > .page1G || (type != EPT.writeBack && type != EPT.uncached) || !legalRights
            || value & undefined != 0
            || !memory.exists(EPT.field.frame(in: value))
        {
            report(.x23, "a leaf has bits that it may not have", guest, value)
        }
    }

    private mutating func report(
        _ invariant: Invariant, _ reason: StaticReason, _ guest: GuestFrame, _ value: UInt64
    ) {
        findings.append(Finding(invariant, reason, frame: EPT.field.frame(in: value), guest: guest))
    }
}
