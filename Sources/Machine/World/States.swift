import Frames
import GuestMemory
import HostMemory
import Synchronization

/// What the world looks like at rest, for the report.
extension World {
    func state(of index: Int) -> RegionState {
        let region = plan.regions[index]
        var state = RegionState(region: index)
        for page in 0..<(region.size >> pageShift) {
            let address = region.address + page << pageShift
            guard let entry = addressSpace.translate(address) else { continue }
            state.mapped += 1
            if entry.accessed { state.entriesAccessed += 1 }
            if entry.dirty { state.entriesDirty += 1 }
            guard let page = host.memory.inspect(entry.frame) else { continue }
            state.add(page)
        }
        countLeaves(&state)
        return state
    }

    private func countLeaves(_ state: inout RegionState) {
        let start = plan.regions[state.region].address
        let end = start + plan.regions[state.region].size
        var (mapped, writable) = (0, 0)
        for slot in vm.activeSlots {
            vm.mmu.forEachLeaf { leaf in
                for i in 0..<leaf.level.frames {
                    let frame = GuestFrame(leaf.guestFrame.number + i)
                    guard slot.frames.contains(frame) else { continue }
                    let address = slot.userAddress(of: frame)
                    guard address >= start, address < end else { continue }
                    mapped += 1
                    if leaf.writable { writable += 1 }
                }
            }
        }
        state.guestMapped = mapped
        state.guestWritable = writable
    }

    func value(of name: StatisticName) -> UInt64 {
        let all = vm.statistics
        switch name {
        case .pf_taken: return all.pf_taken.load(ordering: .relaxed)
        case .pf_fixed: return all.pf_fixed.load(ordering: .relaxed)
        case .pf_fast: return all.pf_fast.load(ordering: .relaxed)
        case .pf_emulate: return all.pf_emulate.load(ordering: .relaxed)
        case .pf_spurious: return all.pf_spurious.load(ordering: .relaxed)
        case .pf_mmio_spte_created: return all.pf_mmio_spte_created.load(ordering: .relaxed)
        case .mmio_exits: return all.mmio_exits.load(ordering: .relaxed)
        case .signal_exits: return all.signal_exits.load(ordering: .relaxed)
        case .pages_4k: return UInt64(all.pages_4k.load(ordering: .relaxed))
        case .pages_2m: return UInt64(all.pages_2m.load(ordering: .relaxed))
        case .pages_1g: return UInt64(all.pages_1g.load(ordering: .relaxed))
        case .remote_tlb_flush: return all.remote_tlb_flush.load(ordering: .relaxed)
        case .remote_tlb_flush_requests: return all.remote_tlb_flush_requests.load(ordering: .relaxed)
        case .tlb_flush: return all.tlb_flush.load(ordering: .relaxed)
        case .pf_guest: return all.pf_guest.load(ordering: .relaxed)
        case .invlpg: return all.invlpg.load(ordering: .relaxed)
        case .exits: return all.exits.load(ordering: .relaxed)
        case .insn_emulation: return all.insn_emulation.load(ordering: .relaxed)
        default: return shadowValue(of: name)
        }
    }
}

extension World {
    /// Of tables that the guest's own stand behind, and of the VM's peaks.
    private func shadowValue(of name: StatisticName) -> UInt64 {
        let all = vm.statistics
        switch name {
        case .mmu_shadow_zapped: return all.mmu_shadow_zapped.load(ordering: .relaxed)
        case .mmu_pte_write: return all.mmu_pte_write.load(ordering: .relaxed)
        case .mmu_pde_zapped: return all.mmu_pde_zapped.load(ordering: .relaxed)
        case .mmu_flooded: return all.mmu_flooded.load(ordering: .relaxed)
        case .mmu_recycled: return all.mmu_recycled.load(ordering: .relaxed)
        case .mmu_cache_miss: return all.mmu_cache_miss.load(ordering: .relaxed)
        case .mmu_unsync: return UInt64(clamping: all.mmu_unsync.load(ordering: .relaxed))
        case .nx_lpage_splits: return UInt64(clamping: all.nx_lpage_splits.load(ordering: .relaxed))
        case .max_mmu_rmap_size: return all.max_mmu_rmap_size.load(ordering: .relaxed)
        case .max_mmu_page_hash_collisions: return all.max_mmu_page_hash_collisions.load(ordering: .relaxed)
        default: preconditionFailure("not a counter of tables")
        }
    }
}

extension RegionState {
    mutating func add(_ page: PageState) {
        pagesWithFrames += 1
        for originator in Originator.allCases {
            if page.headFlags.isAccessed(by: originator) { accessedBy[Int(originator.rawValue)] += 1 }
            if page.headFlags.isDirty(by: originator) { dirtyBy[Int(originator.rawValue)] += 1 }
        }
        lowestCount = min(lowestCount, page.referenceCount)
        highestCount = max(highestCount, page.referenceCount)
    }
}
