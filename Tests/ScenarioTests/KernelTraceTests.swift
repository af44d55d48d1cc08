import Audit
import Frames
import GuestMemory
import Machine
import Testing

@testable import Report

/// A run's events as the kernel's lines, in the kernel's order. Spec: x86 section 10, its reading notes.
@Suite struct X10_TraceOfARun {
    private func run(_ name: String, _ architecture: Architecture? = nil) throws -> RunOutcome {
        let plan = try load(shipped: name).plan
        let arena = try #require(MappedArena(size: World.arenaSize(for: plan)))
        let world = try World(
            plan, policy: .precise, architecture: architecture, arena: arena.base, arenaIsZero: true)
        let outcome = world.run()
        withExtendedLifetime(arena) {}
        return outcome
    }
    /// Names and bodies of all lines but the marks.
    private func lines(_ name: String, _ architecture: Architecture? = nil) throws -> [String] {
        FtraceText.render(try run(name, architecture)).split(separator: "\n").compactMap { line in
            guard !line.hasPrefix("#"), !line.contains("PROBE"), let colon = line.firstRange(of: ": ") else {
                return nil
            }
            return String(line[colon.upperBound...])
        }
    }

    @Test func `a first fault of the TDP MMU: asked for, tables, entry, told again`() throws {
        let names = try lines("anonymous", .x86TDP).prefix(10).map { $0.split(separator: ":")[0] }
        #expect(
            names == [
                "kvm_page_fault", "kvm_mmu_spte_requested", "kvm_mmu_get_page", "kvm_tdp_mmu_spte_changed",
                "kvm_mmu_get_page", "kvm_tdp_mmu_spte_changed", "kvm_mmu_get_page", "kvm_tdp_mmu_spte_changed",
                "kvm_tdp_mmu_spte_changed", "kvm_mmu_set_spte",
            ])
    }
    @Test func `an entry is told at the place where it lies`() throws {
        let lines = try lines("anonymous", .x86TDP)
        let linked = try #require(lines.first { $0.hasPrefix("kvm_tdp_mmu_spte_changed") && $0.contains("level 2 ") })
        let set = try #require(lines.first { $0.hasPrefix("kvm_mmu_set_spte") })
        // The table's address, without the link's bits 11:0 and 63.
        let entry = try #require(UInt64(linked.split(separator: " ").last ?? "", radix: 16))
        let place = try #require(UInt64(set.split(separator: " ").last ?? "", radix: 16))
        #expect(place & ~4095 == entry & 0x000f_ffff_ffff_f000)
    }
    @Test func `a write to a logged page is a fast fault`() throws {
        let fast = try lines("dirty-logging", .x86TDP).filter { $0.hasPrefix("fast_page_fault") }
        #expect(!fast.isEmpty)
        #expect(fast.allSatisfy { $0.contains("error_code P|W ") && $0.hasSuffix("spurious 0 fixed 1") })
        let outcome = try run("dirty-logging", .x86TDP)
        #expect(UInt64(fast.count) == outcome.statistics.first { $0.statistic == .pf_fast }?.value)
    }
    @Test func `no memory, and then some`() throws {
        let lines = try lines("race-mmio-slot").filter { $0.contains("mmio") }
        #expect(lines.count == 2)
        #expect(lines[0].hasPrefix("mark_mmio_spte: sptep:") && lines[0].hasSuffix(" gfn 100 access 6 gen 1"))
        #expect(lines[1].hasPrefix("check_mmio_spte: spte ") && lines[1].hasSuffix(" kvm_gen 2 spte-gen 1 valid 0"))
    }
    @Test func `a split`() throws {
        let lines = try lines("race-eager-split", .x86TDP)
        let split = try #require(lines.firstIndex { $0.hasPrefix("kvm_mmu_split_huge_page: gfn 40000 spte 86") })
        #expect(lines[split].hasSuffix(" level 2 errno 0"))
        #expect(lines[split - 1].hasPrefix("kvm_tdp_mmu_spte_changed: as id 0 gfn 40000 level 2 old_spte 86"))
        #expect(
            lines[split - 2] == "kvm_mmu_get_page: sp gen 0 gfn 40000 l1 8-byte q0 direct wux nxe ad root 0 sync new")
    }
    @Test func `rings`() throws {
        let lines = try lines("dirty-ring", .x86TDP).filter { $0.hasPrefix("kvm_dirty_ring") }
        #expect(lines.contains { $0.hasPrefix("kvm_dirty_ring_push: ring 0: dirty 0x1 reset 0x0 slot 0 offset 0x") })
        #expect(lines.contains { $0.hasPrefix("kvm_dirty_ring_reset: ring 0: ") && $0.hasSuffix("(used 0)") })
        #expect(lines.contains("kvm_dirty_ring_exit: vcpu 0"))
    }
    @Test func `asynchronous faults`() throws {
        let lines = try lines("async-fault", .x86TDP).filter { $0.contains("async") }
        let begun = try #require(lines.firstIndex { $0.hasPrefix("kvm_async_pf_not_present: token 0x1000 gva ") })
        #expect(lines[begun - 1].hasPrefix("kvm_try_async_get_page: gva = "))
        let gone = lines[begun...].firstIndex { $0.hasPrefix("kvm_async_pf_completed: gva ") }
        let told = lines[begun...].firstIndex { $0.hasPrefix("kvm_async_pf_ready: token 0x1000 gva ") }
        #expect(try #require(gone) < #require(told))
    }
    @Test func `ages`() throws {
        let outcome = try run("race-age", .x86TDP)
        let told = FtraceText.render(outcome)
        #expect(told.contains("kvm_age_hva: mmu notifier age hva: 0x00"))
    }
    @Test func `the guest's tables, out of sync and in sync again`() throws {
        let lines = try lines("shadow-unsync")
        let names = lines.prefix(13).map { String($0.split(separator: ":")[0]) }
        #expect(
            names == [
                "kvm_mmu_get_page", "kvm_page_fault", "kvm_mmu_pagetable_walk", "kvm_mmu_paging_element",
                "kvm_mmu_paging_element", "kvm_mmu_paging_element", "kvm_mmu_paging_element",
                "kvm_mmu_set_accessed_bit", "kvm_mmu_get_page", "kvm_mmu_get_page", "kvm_mmu_get_page",
                "kvm_mmu_spte_requested", "kvm_mmu_set_spte",
            ])
        let unsync = try #require(lines.firstIndex { $0.hasPrefix("kvm_mmu_unsync_page: ") })
        let sync = try #require(lines.firstIndex { $0.hasPrefix("kvm_mmu_sync_page: ") })
        // Told before the change.
        #expect(unsync < sync && lines[unsync].hasSuffix(" sync") && lines[sync].hasSuffix(" unsync"))
        #expect(lines[unsync + 1].hasPrefix("kvm_mmu_set_spte: "))
    }
    @Test func `all of them at once`() throws {
        let lines = try lines("race-shadow-zap", .x86Shadow)
        let all = try #require(
            lines.firstIndex { $0.hasPrefix("kvm_mmu_zap_all_fast: kvm-mmu-valid-gen 0 used_pages ") })
        #expect(lines[all + 1].hasPrefix("kvm_mmu_prepare_zap_page: sp gen 0 "))
        // The root once more, when its vCPU lets it go.
        #expect(
            lines[all...].contains {
                $0.hasPrefix("kvm_mmu_prepare_zap_page:") && $0.contains(" invalid nxe ad root 0 ")
            })
    }
    @Test func `each page fault of the guest's has its error`() throws {
        let outcome = try run("shadow-own-tables")
        let lines = FtraceText.render(outcome).split(separator: "\n")
        let errors = lines.filter { $0.contains(" kvm_mmu_walker_error: pferr ") }
        #expect(UInt64(errors.count) == outcome.statistics.first { $0.statistic == .pf_guest }?.value)
        #expect(errors.contains { $0.hasSuffix(" pferr 7 P|W|U") } && errors.contains { $0.hasSuffix(" pferr 4 U") })
    }

    // MARK: Statistics

    /// The rows of section 9, each moved by what it says.
    @Test func `each counter moves when its row says so`() throws {
        func value(_ name: StatisticName, _ outcome: RunOutcome) -> UInt64 {
            outcome.statistics.first { $0.statistic == name }?.value ?? 0
        }
        let tables = try run("shadow-write-protect")
        for name in [
            StatisticName.mmu_shadow_zapped, .mmu_pte_write, .mmu_pde_zapped, .mmu_flooded, .mmu_cache_miss, .pf_guest,
            .pf_taken, .pf_fixed, .pf_emulate, .pf_spurious, .pages_4k, .remote_tlb_flush_requests, .tlb_flush, .exits,
            .insn_emulation,
        ] { #expect(value(name, tables) > 0, "\(name)") }
        // Each emulated store over a table counts, and the emulator's work as well.
        #expect(value(.mmu_pte_write, tables) <= value(.insn_emulation, tables))
        #expect(
            value(.pf_taken, tables) >= value(.pf_fixed, tables) + value(.pf_spurious, tables)
                + value(.pf_emulate, tables))
        let unsync = try run("shadow-unsync")
        #expect(value(.mmu_unsync, unsync) == 0 && value(.max_mmu_rmap_size, unsync) > 0)
        #expect(value(.mmu_unsync, try run("race-shadow-sync")) <= 1)
        #expect(value(.invlpg, try run("shadow-own-tables")) == 3)
        #expect(value(.mmu_shadow_zapped, try run("race-shadow-zap", .x86Shadow)) > 0)
        let mmio = try run("race-mmio-slot")
        #expect(value(.pf_mmio_spte_created, mmio) == 1 && value(.mmio_exits, mmio) == 2)
        #expect(value(.pf_fast, try run("dirty-logging", .x86TDP)) > 0)
        #expect(value(.pages_2m, try run("huge-page", .x86Shadow)) == 1)
        #expect(value(.signal_exits, try run("signal", .x86Shadow)) > 0)
    }
    @Test func `names stand in KVM's order`() throws {
        let outcome = try run("shadow-unsync")
        #expect(
            outcome.counters[0].map { "\($0.name)" } == [
                "remote_tlb_flush", "remote_tlb_flush_requests", "mmu_shadow_zapped", "mmu_pte_write",
                "mmu_pde_zapped", "mmu_flooded", "mmu_recycled", "mmu_cache_miss", "mmu_unsync", "pages_4k", "pages_2m",
                "pages_1g", "nx_lpage_splits", "max_mmu_rmap_size", "max_mmu_page_hash_collisions",
            ])
        #expect(
            outcome.counters[1].map { "\($0.name)" } == [
                "pf_taken", "pf_fixed", "pf_emulate", "pf_spurious", "pf_fast", "pf_mmio_spte_created", "pf_guest",
                "tlb_flush", "invlpg", "exits", "mmio_exits", "signal_exits", "insn_emulation",
            ])
        let told = RunJSON(outcome)
        #expect(told.vm.map(\.name) == outcome.counters[0].map { "\($0.name)" } && told.vcpus.count == 1)
        // One and the same counter, whoever asks.
        for counter in told.vm + told.vcpus[0] { #expect(told.statistics[counter.name] == counter.value) }
        #expect(told.vm.count + told.vcpus[0].count == StatisticName.allCases.count)
    }
}
