import Audit
import Frames
import GuestMemory
import Hardware
import HostMemory
import Synchrony

/// The rules that hold whenever no operation is in flight: between the phases of a run and at its end. Each check
/// computes its answer another way than the code it checks: from the primary tables, the counts, the bitmap.
public struct Checks {
    let vm: VirtualMachine
    let tables: StageTwoTables
    let cpus: [GuestCPU]
    let paged: [PagedCPU]
    let policy: PolicyName

    /// `tables` are those of `vm`, `cpus` and `paged` all of its vCPUs.
    public init(
        vm: VirtualMachine, tables: StageTwoTables, cpus: [GuestCPU], paged: [PagedCPU] = [], policy: PolicyName
    ) {
        self.vm = vm
        self.tables = tables
        self.cpus = cpus
        self.paged = paged
        self.policy = policy
    }

    /// Returns the leaves, by guest frame, for whoever checks more.
    @discardableResult public func run(_ journal: Journal) -> [StageTwoLeaf] {
        for finding in tables.check() { journal.add(finding) }
        var leaves: [StageTwoLeaf] = []
        vm.mmu.forEachLeaf { leaves.append($0) }
        leaves.sort { $0.guestFrame < $1.guestFrame }
        checkLeaves(leaves, journal)
        checkTranslationBuffers(leaves, journal)
        for cpu in paged {
            for finding in cpu.checkTranslations() { journal.add(finding) }
        }
        checkProtocol(journal)
        vm.checkFrameCaches(journal)
        journal.checkQuiescent()
        return leaves
    }

    /// I-6, I-7, I-11, I-12, I-14, I-23, X39, X44, X38: each leaf against the primary table and the slots.
    private func checkLeaves(_ leaves: [StageTwoLeaf], _ journal: Journal) {
        for leaf in leaves {
            for i in 0..<leaf.level.frames {
                check(
                    GuestFrame(leaf.guestFrame.number + i), HostFrame(leaf.frame.number + i), leaf, journal)
            }
        }
    }

    private func check(_ guest: GuestFrame, _ frame: HostFrame, _ leaf: StageTwoLeaf, _ journal: Journal) {
        guard let slot = vm.slot(containing: guest, in: leaf.space), !slot.isInvalid else {
            return journal.add(
                Finding(.i21, "an entry maps a guest frame that no slot contains", frame: frame, guest: guest))
        }
        // Private memory is in no primary table; I-25 is its rule.
        if vm.isPrivate(guest) { return }
        guard let primary = vm.addressSpace.translate(slot.userAddress(of: guest)) else {
            return journal.add(
                Finding(.i6, "an entry maps memory that the process no longer maps", frame: frame, guest: guest))
        }
        if primary.frame != frame {
            return journal.add(
                Finding(.i6, "an entry maps another frame than the process does", frame: frame, guest: guest))
        }
        if leaf.writable {
            if !primary.writable {
                journal.add(
                    Finding(.i7, "an entry lets the guest write what the process may not", frame: frame, guest: guest))
            }
            if slot.flags.readOnly {
                journal.add(Finding(.i23, "an entry of a read-only slot is writable", frame: frame, guest: guest))
            }
            checkLogged(guest, leaf, slot, journal)
            checkMarkedDirty(guest, frame, primary, journal)
        }
    }

    private func checkLogged(_ guest: GuestFrame, _ leaf: StageTwoLeaf, _ slot: MemorySlot, _ journal: Journal) {
        guard slot.isLogged else { return }
        if leaf.level > .page4K, !vm.manualProtect.initiallySet {
            journal.add(Finding(.x39, "a huge writable entry in a logged slot", guest: guest))
        }
        // Where the processor logs pages itself, D says whether it has to.
        if vm.mmu.hardwareLogEntries != 0, !leaf.dirty { return }
        if !vm.logHasHoles, !vm.isInDirtyLog(guest, of: slot) {
            journal.add(Finding(.x44, "a page of a logged slot is writable and not in the log", guest: guest))
        }
    }

    /// Under `precise` a counted page that the guest can write was marked dirty when the entry was made (I-11).
    private func checkMarkedDirty(
        _ guest: GuestFrame, _ frame: HostFrame, _ primary: HostTranslation, _ journal: Journal
    ) {
        guard policy == .precise, !primary.special, let state = vm.memory.inspect(frame) else { return }
        if !state.headFlags.isReserved, !state.headFlags.isDirty(by: .kvm) {
            journal.add(
                Finding(.i11, "the guest can write a page that was never marked dirty", frame: frame, guest: guest))
        }
    }

    /// X11, I-13: a cached translation is backed by an entry that still grants it, or its flush is posted.
    private func checkTranslationBuffers(_ leaves: [StageTwoLeaf], _ journal: Journal) {
        for cpu in cpus where !cpu.hasRequest {
            let leaves = leaves.filter { $0.space == cpu.addressSpaceNumber }
            for entry in cpu.buffer.entries {
                let cached = entry.translation
                let first = entry.guest
                guard let leaf = leaves.leaf(containing: first) else {
                    journal.add(
                        Finding(
                            .x11, "a TLB holds a translation whose entry is gone", frame: cached.frame, guest: first))
                    continue
                }
                let frame = HostFrame(leaf.frame.number + (first.number - leaf.guestFrame.number))
                if frame != cached.frame {
                    journal.add(
                        Finding(.x11, "a TLB holds another frame than the entry", frame: cached.frame, guest: first))
                } else if cached.writable && !leaf.writable && !vm.mmu.awaitsAccess(leaf.entry) {
                    journal.add(
                        Finding(
                            .i13, "a TLB lets the guest write what the entry no longer does", frame: frame, guest: first
                        ))
                }
            }
        }
    }

    /// I-9, I-20, X63.
    private func checkProtocol(_ journal: Journal) {
        if vm.invalidationsInProgress != 0 || vm.activeNotifierCount != 0 {
            journal.add(Finding(.i9, "an invalidation is counted as running although none runs"))
        }
        if !vm.slotSetsAgree() { journal.add(Finding(.i20, "the two sets of slots differ at rest")) }
        for finding in vm.checkBindings() { journal.add(finding) }
        noteLockViolations(journal)
        if let zero = vm.memory.inspect(vm.host.zeroPage), zero.flags.isDirty || zero.flags.isAccessed {
            journal.add(Finding(.i14, "the zero page's flags were changed", frame: vm.host.zeroPage))
        }
    }

    /// X63, for the running task.
    func noteLockViolations(_ journal: Journal) {
        let violations = LockViolations.ofCurrentTask()
        if violations.order > 0 { journal.add(Finding(.x63, "a lock was taken against the lock order")) }
        if violations.sleeping > 0 { journal.add(Finding(.x63, "a task slept while it held a spinning lock")) }
        LockViolations.clear()
    }
}

extension [StageTwoLeaf] {
    /// The leaf that maps `frame`; the array is sorted by guest frame.
    func leaf(containing frame: GuestFrame) -> StageTwoLeaf? {
        var low = 0
        var high = count
        while low < high {
            let middle = (low + high) / 2
            if self[middle].guestFrame <= frame { low = middle + 1 } else { high = middle }
        }
        guard low > 0 else { return nil }
        let leaf = self[low - 1]
        return frame.number - leaf.guestFrame.number < leaf.level.frames ? leaf : nil
    }
}
