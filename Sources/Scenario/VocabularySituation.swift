import Machine

// The keys that describe the situation: the host, the VM, its slots, and what is expected of the whole run.

extension Vocabulary {
    static let architectures: [Choice] = [
        Choice("x86-tdp", "x86 with EPT, 4 levels: 48-bit guest addresses"),
        Choice("riscv-sv39x4", "RISC-V, 3 levels: 41-bit guest addresses"),
        Choice("riscv-sv48x4", "RISC-V, 4 levels: 50-bit guest addresses"),
        Choice(
            "x86-shadow",
            "x86 without EPT or NPT: the guest's own page tables, 4 levels one to one, are shadowed; 46-bit guest addresses"
        ),
        Choice(
            "x86-tdp-legacy", "x86 with EPT, whose tables the shadow MMU keeps (`tdp_mmu=N`): 48-bit guest addresses"),
    ]

    static let regionKinds: [Choice] = [
        Choice("anonymous", "private anonymous memory, what most VMMs give a guest"),
        Choice("memfd", "a memfd, mapped MAP_SHARED"),
        Choice("memfd_private", "a memfd, mapped MAP_PRIVATE: a write copies the page"),
        Choice(
            "graphics_buffer",
            "a buffer as TTM makes them: VM_PFNMAP|VM_IO, filled by fault, non-compound blocks of `order` "
                + "whose tail pages have count 0"),
        Choice("device_bar", "device memory without struct pages, VM_PFNMAP|VM_IO"),
        Choice("reserved_memory", "RAM with PG_reserved struct pages, PFN-mapped"),
        Choice("counted_pfnmap", "ordinary pages with count 1, PFN-mapped all the same"),
        Choice(
            "mixedmap", "VM_MIXEDMAP: even pages are counted pages, odd ones device memory by special entries"),
        Choice(
            "write_notify_pfnmap",
            "a perf ring: PFN-mapped, page 0 present read-only until the driver's pfn_mkwrite, the data pages read-only"
        ),
        Choice(
            "dax_file",
            "a file on persistent memory: counted pages without a page cache; the first write to each page is heard of"),
        Choice(
            "udmabuf", "the pinned pages of the memfd `source`, PFN-mapped, from its start; seals it against shrinking"),
        Choice(
            "blob_window",
            "the host-visible BAR of a virtual GPU: reserved address space, which allows what `protection` says, into which `map_blob` maps buffers"
        ),
        Choice("file", "a file, mapped MAP_SHARED: a page cache over a disk; writes wait for `fsync`"),
        Choice("file_private", "a file, mapped MAP_PRIVATE: a write copies the page"),
        Choice("memfd_secret", "memfd_secret: nobody but its process can reach it, KVM can't either"),
        Choice("hugetlb", "a memfd of huge pages (MFD_HUGETLB) of `page_size`, mapped MAP_SHARED"),
        Choice("hugetlb_private", "the same, mapped MAP_PRIVATE: a write copies the whole huge page"),
    ]

    /// In the order of `UserFaults.Modes`.
    static let userFaultModes: [Choice] = [
        Choice("missing", "UFFDIO_REGISTER_MODE_MISSING: where no page is"),
        Choice("minor", "UFFDIO_REGISTER_MODE_MINOR: where a memfd has the page, and it is not mapped"),
        Choice("write_protect", "UFFDIO_REGISTER_MODE_WP: writes to pages that were protected"),
    ]

    static let speeds: [Choice] = [
        Choice("fast", "a fault reads it at once"),
        Choice("slow", "a fault gives up the mmap lock and waits; a caller who may not is told"),
    ]

    static let protections: [Choice] = [
        Choice("none", "PROT_NONE"),
        Choice("read", "PROT_READ"),
        Choice("read-write", "PROT_READ|PROT_WRITE"),
    ]

    static let slotFlags: [Choice] = [
        Choice("log_dirty_pages", "KVM_MEM_LOG_DIRTY_PAGES"),
        Choice("readonly", "KVM_MEM_READONLY: a guest write leaves for MMIO emulation"),
    ]

    /// Kernel: the user slots of a VM are fewer than 32767 less a few of KVM's own. Spec: generic 4.4.
    static let slotIDs: ClosedRange<UInt64> = 0...32763
    static let virtualCPUs: ClosedRange<UInt64> = 1...16
    /// Kernel: `MAX_PAGE_ORDER`.
    static let orders: ClosedRange<UInt64> = 0...10
    /// A run of accesses longer than this is a benchmark, not a scenario.
    static let counts: ClosedRange<UInt64> = 1...1_048_576
    static let word: ClosedRange<UInt64> = 0...UInt64.max

    static let situation: [Key] = scenario + host + region + vm + slot + phase + outcome + known

    private static let scenario: [Key] = [
        Key("name", .scenario, .name, .required, "what reports call the scenario", example: "virtio-gpu-blob"),
        Key(
            "architecture", .scenario, .choice(architectures), .optional("x86-tdp"),
            "the MMU that `run` takes; `compare` takes them all", example: "riscv-sv39x4"),
        Key("host", .scenario, .mapping(.host), .required, "the host's memory", example: "{regions: [...]}"),
        Key("vm", .scenario, .mapping(.vm), .required, "the virtual machine", example: "{slots: [...]}"),
        Key(
            "phases", .scenario, .list(.phase), .required,
            "what happens, one phase after the other; inside a phase the tasks run side by side",
            example: "[{vcpu0: [...]}, {host: [...]}]"),
        Key(
            "expect", .scenario, .mapping(.outcome), .optional("nothing more than the steps expect"),
            "what holds at the end, under the policy `precise`", example: "{statistics: {pf_fixed: 3}}"),
        Key(
            "known", .scenario, .mapping(.known), .optional("no deviations"),
            "which rules the older policies break here; `compare` exits 0 when it finds exactly these",
            example: "{guess: [I-5, expect]}"),
    ]

    private static let host: [Key] = [
        Key("memory", .host, .size, .optional("16 MiB"), "RAM of the host, page tables included", example: "64 MiB"),
        Key(
            "device_memory", .host, .size, .optional("0"), "device memory, which has no struct pages",
            example: "2 MiB"),
        Key(
            "vram", .host, .size, .optional("no limit but `device_memory`"),
            "device memory that graphics buffers may take together; the least recently used goes back to system memory",
            example: "64 KiB"),
        Key(
            "graphics_system_memory", .host, .size, .optional("no limit but `memory`"),
            "system memory that graphics buffers may take together; the least recently used goes to swap",
            example: "256 KiB"),
        Key(
            "swap", .host, .size, .optional("0: there is none"), "the swap device; with it the host reclaims",
            example: "4 MiB"),
        Key("swap_speed", .host, .choice(speeds), .optional("fast"), "of reading from it", example: "slow"),
        Key(
            "reclaim", .host, .flag, .optional("false, without `swap`"),
            "the host knows its pages' age and where they are mapped: it can take them back, and move them",
            example: "true"),
        Key(
            "hugetlb_2m", .host, .number(0...32768), .optional("0"),
            "huge pages of 2 MiB set aside for `hugetlb`, out of `memory`", example: "4"),
        Key(
            "hugetlb_1g", .host, .number(0...64), .optional("0"), "huge pages of 1 GiB set aside", example: "1"),
        Key(
            "transparent_huge_pages", .host, .flag, .optional("false"),
            "a fault may take a 2 MiB folio for anonymous memory", example: "true"),
        Key(
            "regions", .host, .list(.region), .required, "the mappings of the VMM's address space",
            example: "[{name: ram, kind: anonymous, size: 2 MiB}]"),
    ]

    private static let region: [Key] = [
        Key("name", .region, .name, .required, "what steps and slots call it", example: "blob"),
        Key("kind", .region, .choice(regionKinds), .required, "what is behind the mapping", example: "graphics_buffer"),
        Key("size", .region, .size, .required, "bytes, whole pages", example: "64 KiB"),
        Key(
            "address", .region, .userAddress, .optional("assigned, 2 MiB aligned"),
            "the host virtual address", example: "0x7f0000000000"),
        Key("protection", .region, .choice(protections), .optional("read-write"), "of the mapping", example: "read"),
        Key(
            "order", .region, .number(orders), .optional("0"),
            "a graphics buffer is made of blocks of 2^order pages", example: "4"),
        Key(
            "speed", .region, .choice(speeds), .optional("fast"),
            "of reading pages of a memfd or a file that are not in memory", example: "slow"),
        Key(
            "userfault", .region, .choices(userFaultModes), .optional("none"),
            "faults that the VMM serves itself, by the steps of its task `uffd`", example: "[missing]"),
        Key(
            "page_size", .region, .size, .optional("2 MiB"), "of hugetlb memory: 2 MiB or 1 GiB", example: "1 GiB"),
        Key(
            "huge_pages", .region, .flag, .optional("false"), "madvise(MADV_HUGEPAGE) on anonymous memory",
            example: "true"),
        Key(
            "source", .region, .region, .optional("for a `udmabuf`, which must have one"),
            "the memfd whose pages a udmabuf has, a region before it", example: "ram"),
    ]

    private static let vm: [Key] = [
        Key("vcpus", .vm, .number(virtualCPUs), .optional("1"), "how many vCPUs", example: "2"),
        Key(
            "allow_unsafe_mappings", .vm, .flag, .optional("false"),
            "KVM's module parameter: KVM's own maps of PFN-mapped guest pages are allowed", example: "true"),
        Key(
            "type", .vm, .choice(machineTypes), .optional("default"), "the type that KVM_CREATE_VM is given",
            example: "sw_protected"),
        Key(
            "dirty_ring", .vm, .size, .optional("none: slots have bitmaps"),
            "bytes of each vCPU's dirty ring (KVM_CAP_DIRTY_LOG_RING_ACQ_REL): a power of two, 4 KiB to 1 MiB",
            example: "64 KiB"),
        Key(
            "async_faults", .vm, .flag, .optional("false"),
            "a vCPU leaves a page that must be read to `async_worker` and halts; if that doesn't run, it reads it itself",
            example: "true"),
        Key(
            "page_tables", .vm, .region, .optional("memory and a slot of their own"),
            "on `x86-shadow`: the region at whose start the guest has its page tables, which a slot shows from there on",
            example: "tables"),
        Key(
            "slots", .vm, .list(.slot), .optional("none"), "the memslots when the first phase starts",
            example: "[{slot: 0, guest_phys_addr: 0x10000000, userspace_addr: ram}]"),
    ]

    private static let slot: [Key] = [
        Key("slot", .slot, .slotID, .required, "the slot's id", example: "0"),
        Key(
            "guest_phys_addr", .slot, .number(word), .required, "where the guest sees it",
            example: "0x10000000"),
        Key(
            "userspace_addr", .slot, .regionPlace, .required, "the region behind it, perhaps with an offset",
            example: "ram+2 MiB"),
        Key("memory_size", .slot, .size, .optional("to the end of the region"), "bytes", example: "1 MiB"),
        Key(
            "guest_memfd", .slot, .flag, .optional("false"),
            "the slot has a guest_memfd of its size too, for its private pages", example: "true"),
        Key("flags", .slot, .choices(slotFlags), .optional("none"), "the slot's flags", example: "[readonly]"),
    ]

    private static let phase: [Key] =
        [
            Key("name", .phase, .text, .optional("numbered"), "what happens in it", example: "the guest draws"),
            Key(
                "vcpu", .phase, .list(.guestStep), .optional("the vCPU rests"),
                "the guest program of a vCPU: `vcpu0`, `vcpu1`, ...", example: "[{write: 0x10000000, value: 7}]",
                numbered: true),
            Key(
                "host", .phase, .list(.hostStep), .optional("the host rests"),
                "what the VMM, its children, drivers and KVM's ioctls do", example: "[{munmap: ram}]"),
        ] + backgroundTasks

    /// Tasks of the host's own, by the kernel's names.
    private static let backgroundTasks: [Key] = BackgroundTask.allCases.map { task in
        Key(
            "\(task.name)", .phase, .list(.hostStep), .optional("it rests"), meaning(of: task),
            example: example(of: task))
    }

    private static func meaning(of task: BackgroundTask) -> String {
        switch task {
        case .kswapd: "the task that reclaims pages; like each of the host's own it runs beside the others"
        case .kcompactd: "the task that moves pages"
        case .khugepaged: "the task that makes huge pages of small ones"
        case .ksmd: "the task that merges equal pages"
        case .flusher: "the task that writes files back"
        case .oomReaper: "the task that takes a dying process's memory"
        case .memoryFailure: "the task that deals with broken memory"
        case .vmm: "the VMM's thread that migrates and takes snapshots"
        case .device: "a device that writes guest memory"
        case .kvm: "KVM itself, where it reads and writes guest memory for devices of its own"
        case .asyncWorker: "the work queue that fetches pages for vCPUs with `async_faults`"
        case .userFaultServer:
            "the VMM's task that serves userfaults; `run` begins it when another task waits for one, if that stands first"
        }
    }

    private static func example(of task: BackgroundTask) -> String {
        switch task {
        case .kswapd: "[{reclaim: 16}]"
        case .kcompactd: "[{migrate: ram}]"
        case .khugepaged: "[collapse_pages]"
        case .ksmd: "[merge_pages]"
        case .flusher: "[{fsync: data}]"
        case .oomReaper: "[reap]"
        case .memoryFailure: "[{memory_failure: ram}]"
        case .vmm: "[precopy: start]"
        case .device: "[{dma_store: ram, value: 7}]"
        case .kvm: "[{cache_write: ram, value: 7}]"
        case .asyncWorker: "[async_fetch]"
        case .userFaultServer: "[uffd_wait, {uffd_copy: ram, value: 7}]"
        }
    }

    private static let outcome: [Key] = [
        Key(
            "statistics", .outcome, .mapping(.statistics), .optional("not looked at"), "KVM's counters",
            example: "{pf_fixed: 3}")
    ]

    private static let known: [Key] = ["guess", "tracked"].flatMap { policy in
        [
            Key(
                policy, .known, .rules, .optional("no deviations"), "what breaks under `\(policy)`",
                example: "[I-5, expect]")
        ]
            + architectureWords.map { word in
                Key(
                    "\(policy) on \(word)", .known, .rules, .optional("as `\(policy)`"),
                    "the same on `\(word)` alone, in the place of what `\(policy)` says", example: "[I-4]")
            }
    }

    /// Every way to name architectures.
    static let architectureWords = architectures.map(\.word) + ["x86", "riscv"]

    static func architectureSet(_ word: String) -> ArchitectureSet? {
        if word == "riscv" { return .riscv }
        if word == "x86" { return .x86 }
        return architectures.firstIndex { $0.word == word }.map { ArchitectureSet(Architecture.allCases[$0]) }
    }
}
