import Audit
import Frames
import GuestMemory
import Hardware
import HostMemory
import Synchrony

/// Rules about memory that goes, and about who still reaches it.
extension StepChecks {
    /// X11, I-13: when the notifiers have returned from a start, nothing maps the range, and no vCPU can use a translation
    /// of it. An entry that is made afterwards is found when it is made (X12); a TLB that is filled afterwards, from a
    /// walk before the zap, by the read of the TLBs here and at the change of the primary entry.
    func notifiersReturned(_ first: UInt64, _ pages: UInt64) {
        let start = UserAddress(first << pageShift)
        let range = start..<(start + pages << pageShift)
        for slot in vm.activeSlots {
            guard let frames = slot.frames(intersecting: range) else { continue }
            for leaf in mirror.leaves where leaf.guestFrames.overlaps(frames) {
                report(
                    .x11, "the notifier's start has returned and an entry still maps the range", leaf.frame, leaf.guest)
            }
            forEachCached { cpu, cached in
                guard cached.guestFrames.overlaps(frames), canUse(cpu) else { return }
                report(
                    .x11, "the notifier's start has returned and a vCPU's TLB still maps the range", cached.frame,
                    cached.guest)
            }
        }
    }

    /// I-6, I-7, I-13: when a primary entry loses its frame or its right to write, the notifier has been called before, so
    /// no stage-2 entry and no TLB that a vCPU can use maps more than is left. An event of a forked child finds the
    /// parent's entries as they were. The check reads the TLBs and the entries' rights, and so conflicts with fills and
    /// with changes of rights; an installation reads the primary entry that changes here.
    func primaryChanged(_ event: Event) {
        let start = UserAddress(event.guest << pageShift)
        let range = start..<(start + PageLevel(event.level).bytes)
        for slot in vm.activeSlots {
            guard let frames = slot.frames(intersecting: range) else { continue }
            schedulingNote(.atomicLoad, rights.value)
            for leaf in mirror.leaves where leaf.guestFrames.overlaps(frames) {
                check(leaf, max(leaf.guest, frames.lowerBound), slot, isCached: false)
            }
            forEachCached { cpu, cached in
                guard cached.guestFrames.overlaps(frames), canUse(cpu) else { return }
                check(cached, max(cached.guest, frames.lowerBound), slot, isCached: true)
            }
        }
    }

    private func check(_ leaf: LeafMirror.Leaf, _ guest: GuestFrame, _ slot: MemorySlot, isCached: Bool) {
        guard let frame = leaf.frame(for: guest) else { return }
        let primary = vm.addressSpace.translate(slot.userAddress(of: guest))
        if primary?.frame != frame {
            // Private memory is in no primary table; I-25 is its rule.
            if vm.isPrivate(guest) { return }
            report(
                isCached ? .i13 : .i6,
                isCached
                    ? "the process's page changes while a vCPU's TLB maps the old one"
                    : "the process's page changes while a stage-2 entry maps the old one", frame, guest)
        } else if leaf.writable, primary?.writable == false {
            report(
                isCached ? .i13 : .i7,
                isCached
                    ? "the process's page becomes read-only while a vCPU's TLB lets the guest write it"
                    : "the process's page becomes read-only while a stage-2 entry lets the guest write it", frame, guest
            )
        }
    }

    private func forEachCached(_ body: (VirtualCPU, LeafMirror.Leaf) -> Void) {
        forEachBuffer { cpu, buffer, leaves in
            schedulingNote(.tlbRead, buffer.value)
            for leaf in leaves { body(cpu, leaf) }
        }
    }

    private func forEachBuffer(_ body: (VirtualCPU, ObjectIdentity, [LeafMirror.Leaf]) -> Void) {
        for cpu in cpus { body(cpu, cpu.buffer.identity, cpu.cachedLeaves) }
        for cpu in paged { body(cpu, cpu.buffer.identity, cpu.cachedLeaves) }
    }

    /// Whether the vCPU can go on using what its TLB holds: it runs guest code, or will without a flush.
    private func canUse(_ cpu: VirtualCPU) -> Bool {
        schedulingNote(.conditionRead, cpu.identity.value)
        return cpu.isExecuting || !(cpu.hasRequest || cpu.isFlushing)
    }

    // MARK: Pages

    /// I-2, I-6, I-13: nothing that the guest can reach, and nothing that KVM holds, is freed. Whoever begins to use a
    /// page (an entry made, a TLB filled, an access, a reference) has announced that on the page, and the free conflicts.
    func freed(_ first: HostFrame, _ count: UInt64) {
        for holding in journal.holdings where holding.frame >= first.number && holding.frame < first.number + count {
            journal.add(Finding(.i2, "a page is freed while KVM holds it", frame: HostFrame(holding.frame)))
        }
        checkUnreachable(
            first, count, "a page is freed while a stage-2 entry maps it", "a page is freed while a vCPU's TLB maps it")
    }

    /// The same of memory that a driver gives back to its pool, or leaves for good: no allocator hears of it, and no count
    /// protects it.
    func leftByDriver(_ first: HostFrame, _ count: UInt64) {
        checkUnreachable(
            first, count, "a driver gives memory back while a stage-2 entry maps it",
            "a driver gives memory back while a vCPU's TLB maps it")
    }

    private func checkUnreachable(
        _ first: HostFrame, _ count: UInt64, _ inEntry: StaticReason, _ inBuffer: StaticReason
    ) {
        for leaf in mirror.leaves where leaf.maps(first.number, count) { report(.i6, inEntry, leaf.frame, leaf.guest) }
        forEachBuffer { cpu, buffer, leaves in
            for leaf in leaves where leaf.maps(first.number, count) {
                schedulingNote(.tlbRead, buffer.value)
                if canUse(cpu) { report(.i13, inBuffer, leaf.frame, leaf.guest) }
            }
        }
    }

    // MARK: The guest's accesses

    /// I-13, I-21, I-23: at the moment of an access the process maps the same frame there, and may write it if the guest
    /// does. It can't be otherwise: whoever takes that away sees every vCPU out of guest mode first, and a vCPU that comes
    /// back has dropped its translations. The check reads the primary entry, the slots and the page.
    func reached(_ guest: GuestFrame, _ frame: HostFrame, isStore: Bool) {
        guard let slot = vm.slot(containing: guest) else {
            return report(.i21, "the guest reaches memory whose slot is gone", frame, guest)
        }
        if let state = vm.memory.inspect(frame), state.flags.isFree {
            return report(.i13, "the guest reaches a page that is free", frame, guest)
        }
        let primary = vm.addressSpace.translate(slot.userAddress(of: guest))
        if primary?.frame != frame, vm.isPrivate(guest) {
            // Private memory is in no primary table; I-25 is its rule.
        } else if primary?.frame != frame {
            report(.i13, "the guest reaches a page that the process no longer maps there", frame, guest)
        } else if isStore, slot.flags.readOnly {
            report(.i23, "the guest writes a read-only slot", frame, guest)
        } else if isStore, primary?.writable == false {
            report(.i13, "the guest writes a page that the process may not write", frame, guest)
        }
        if isStore {
            consumers?.noteWrite(by: .guest, to: guest, frame)
            stored(guest, slot)
        }
    }
}
