import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// The rules on G-stage tables that can be seen at rest. Spec: arches 2.4.
extension GStageMMU {
    func visitLeaves(_ body: (StageTwoLeaf) -> Void) {
        guard root != nil else { return }
        let tables = tables
        for run in tables.runs(in: GuestFrame(0)..<tables.end) {
            for i in 0..<run.count {
                let value = tables.entry(run.firstIndex + i, of: run.table).peek()
                guard tables.format.isLeaf(value, run.level.rawValue) else { continue }
                body(
                    StageTwoLeaf(
                        guestFrame: run.base.advanced(by: i * Int(run.level.frames)),
                        frame: tables.format.field.frame(in: value), level: run.level,
                        writable: value & GStageBits.write != 0, accessed: value & GStageBits.accessed != 0,
                        dirty: value & GStageBits.dirty != 0, entry: value))
            }
        }
    }

    /// RV-1 to RV-4 on every entry under the root. With nobody else running.
    ///
    /// It reads raw entries, also those that no walk accepts, and shares no decision with the code that writes them.
    public func checkTables() -> [Finding] {
        guard let root else { return [] }
        var findings: [Finding] = []
        if root.number & 3 != 0 {
            findings.append(
                Finding(.rv3, "the root is not aligned to its 16 KiB, so hgatp names another one", frame: root))
        }
        check(root, level: PageLevel(mode.levels), base: GuestFrame(0), entries: 2048, &findings)
        return findings
    }

    private func check(
        _ table: HostFrame, level: PageLevel, base: GuestFrame, entries: Int, _ findings: inout [Finding]
    ) {
        let first = StageTwoEntry(vm.memory.entry(0, of: table), GStageFormat(levels: mode.levels).field)
        for i in 0..<entries {
            let value = first.following(i).peek()
            guard value != 0 else { continue }
            let frame = GuestFrame(base.number + UInt64(i) * level.frames)
            if value & GStageBits.rights != 0 {
                checkLeaf(value, level, frame, &findings)
            } else if checkLink(value, level, frame, &findings) {
                let next = HostFrame(value >> 10)
                check(next, level: level.below, base: frame, entries: 512, &findings)
            }
        }
    }

    /// A link is V and a frame number, and leads to a table of this MMU. Returns whether it can be followed.
    private func checkLink(
        _ value: UInt64, _ level: PageLevel, _ frame: GuestFrame, _ findings: inout [Finding]
    ) -> Bool {
        guard value & 0x3ff == GStageBits.valid, value >> 54 == 0, level > .page4K,
            vm.memory.hasPageFrame(HostFrame(value >> 10))
        else {
            findings.append(Finding(.rv1, "an entry that grants nothing is neither empty nor a link", guest: frame))
            return false
        }
        return true
    }

    private func checkLeaf(
        _ value: UInt64, _ level: PageLevel, _ frame: GuestFrame, _ findings: inout [Finding]
    ) {
        let target = HostFrame(value >> 10 & 0xfff_ffff_ffff)
        // V, R, X and U in each; A may have aged; D has a rule of its own; G, RSW, PBMT and N in none.
        if value & 0x3ff & ~0xc4 != 0x1b || value >> 54 != 0 {
            findings.append(Finding(.rv1, "a leaf has a bit too many or too few", frame: target, guest: frame))
        }
        if target.number % level.frames != 0 {
            findings.append(Finding(.rv2, "a huge leaf's frame is not aligned", frame: target, guest: frame))
        }
        if value & GStageBits.dirty == 0 {
            findings.append(Finding(.rv4, "a leaf lost its D bit", frame: target, guest: frame))
        }
        checkMemory(value, level, frame, &findings)
    }

    /// A leaf maps a slot, and what it lets the guest write is logged where the slot is.
    private func checkMemory(
        _ value: UInt64, _ level: PageLevel, _ frame: GuestFrame, _ findings: inout [Finding]
    ) {
        vm.withSlots {
            for i in 0..<level.frames {
                let page = GuestFrame(frame.number + i)
                guard let slot = vm.slot(containing: page) else {
                    findings.append(Finding(.rv3, "a leaf maps what no slot contains", guest: page))
                    continue
                }
                guard value & GStageBits.write != 0, slot.isLogged else { continue }
                if !vm.isInDirtyLog(page, of: slot) {
                    findings.append(Finding(.rv4, "a page of a logged slot is writable and not logged", guest: page))
                }
            }
        }
    }
}
