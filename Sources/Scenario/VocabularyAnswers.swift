import Machine

extension Vocabulary {
    /// The keys of what a step may give.
    static let answers: [Key] =
        [
            Key("pages", .answer, .pages, .optional(""), "exactly these pages of the slot", example: "[0, 3]"),
            Key(
                "counting_from", .answer, .number(word), .optional(""),
                "the first value read; each next is one more", example: "0x1000"),
            Key(
                "any_of", .answer, .answer, .optional(""),
                "any of these answers: for a step that races with another task's and may end in each of these ways",
                example: "[0x11, EFAULT]"),
        ]
        + (architectureWords + ["otherwise"]).map { word in
            Key(
                word, .answer, .answer, .optional(""),
                word == "otherwise" ? "the answer on the other architectures" : "the answer on `\(word)`",
                example: "mmio")
        }
        + StatisticName.allCases.map { statistic in
            Key(
                "\(statistic)", .statistics, .counter, .optional("not looked at"), meaning(of: statistic), example: "3")
        }

    /// Spec: x86 section 9.
    private static func meaning(of statistic: StatisticName) -> String {
        switch statistic {
        case .pf_taken: "guest page faults that reached the MMU"
        case .pf_fixed: "faults that ended with an entry"
        case .pf_fast: "faults fixed without mmu_lock"
        case .pf_emulate: "faults that ended in emulation"
        case .pf_spurious: "faults whose entry was already right"
        case .pf_mmio_spte_created: "MMIO entries made"
        case .mmio_exits: "exits to the VMM for MMIO"
        case .signal_exits: "exits for a signal"
        case .pages_4k: "4 KiB leaves now"
        case .pages_2m: "2 MiB leaves now"
        case .pages_1g: "1 GiB leaves now"
        case .remote_tlb_flush: "flushes of all vCPUs done"
        case .remote_tlb_flush_requests: "flushes of all vCPUs asked for"
        case .tlb_flush: "flushes that a vCPU served"
        case .mmu_shadow_zapped: "shadow pages zapped; a root in use counts twice"
        case .mmu_pte_write: "emulated stores over guest page tables"
        case .mmu_pde_zapped: "those over a present entry above the lowest level"
        case .mmu_flooded: "shadow pages given up because the guest wrote their table again and again"
        case .mmu_recycled: "shadow pages given up for want of room"
        case .mmu_cache_miss: "shadow pages made because none was found"
        case .mmu_unsync: "shadow pages out of sync now"
        case .nx_lpage_splits: "huge pages not allowed because they would be executable, now"
        case .max_mmu_rmap_size: "most entries that mapped one guest frame"
        case .max_mmu_page_hash_collisions: "most other pages passed in a search for a shadow page"
        case .pf_guest: "page faults injected into the guest"
        case .invlpg: "INVLPGs of the guest"
        case .exits: "exits from guest mode"
        case .insn_emulation: "instructions that KVM carried out in the guest's place"
        }
    }
}
