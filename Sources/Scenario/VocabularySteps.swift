import Machine

// The keys of steps and of their answers.

extension Vocabulary {
    /// In the order of `AdviceName`, behind `dontneed`.
    static let advices: [Choice] = [
        Choice("dontneed", "MADV_DONTNEED"),
        Choice("free", "MADV_FREE: reclaim may drop what nobody writes again"),
        Choice("cold", "MADV_COLD"),
        Choice("pageout", "MADV_PAGEOUT"),
        Choice("collapse", "MADV_COLLAPSE"),
        Choice("mergeable", "MADV_MERGEABLE"),
        Choice("unmergeable", "MADV_UNMERGEABLE"),
        Choice("hugepage", "MADV_HUGEPAGE"),
        Choice("nohugepage", "MADV_NOHUGEPAGE"),
        Choice("populate_read", "MADV_POPULATE_READ"),
        Choice("populate_write", "MADV_POPULATE_WRITE"),
        Choice("remove", "MADV_REMOVE: a hole in what is behind the mapping"),
        Choice("guard_install", "MADV_GUARD_INSTALL: every access is SIGSEGV"),
        Choice("guard_remove", "MADV_GUARD_REMOVE"),
    ]
    static let transfers: [Choice] = [
        Choice("read", "the next read gives an I/O error"), Choice("write", "the next write does"),
    ]
    /// In the order of `DriverAnswer`.
    static let driverAnswers: [Choice] = [
        Choice("sigbus", "VM_FAULT_SIGBUS"),
        Choice("oom", "VM_FAULT_OOM"),
        Choice("hwpoison", "VM_FAULT_HWPOISON"),
        Choice("retry", "VM_FAULT_RETRY: the lock is dropped, and the fault comes again"),
        Choice("nopage", "VM_FAULT_NOPAGE, though nothing was inserted: against the contract D-1 if it goes on"),
    ]
    /// In the order of `SignalName`.
    static let signals: [Choice] = [
        Choice("plain", "one that has a handler"), Choice("fatal", "SIGKILL"),
        Choice("handled", "the plain one was handled: none is pending"),
    ]
    /// In the order of `PrecopyStep`.
    static let precopySteps: [Choice] = [
        Choice("start", "logging is turned on for every slot, and every page is copied to a new destination"),
        Choice("round", "the logs are taken, and the pages that they name are copied"),
        Choice("stop", "everything stands still, the rest is copied, the image is checked, logging is turned off"),
    ]
    /// In the order of `SnapshotKind`.
    static let snapshotKinds: [Choice] = [
        Choice("full", "every page; logging is turned on"),
        Choice("diff", "the pages that the logs name since the last snapshot; the others are holes in the file"),
    ]
    static let destinations: [Choice] = [
        Choice("device_memory", "device memory, no struct pages"),
        Choice("system", "system memory, in blocks of `order`"),
    ]
    static let accesses: [Choice] = [Choice("read", "for reading"), Choice("write", "for writing")]
    static let manualProtect: [Choice] = [
        Choice("initially_set", "with KVM_DIRTY_LOG_INITIALLY_SET: a new log has every page")
    ]

    static let steps: [Key] = guestSteps + hostSteps + parameters(.guestStep) + parameters(.hostStep)

    /// Regions with something behind the mapping that has bytes of its own to show.
    private static let driverKinds: [RegionKind] = [
        .graphicsBuffer, .deviceBAR, .sharedMemory, .privateObject, .daxFile, .udmabuf, .file, .privateFile,
    ]
    private static let memfds: [RegionKind] = [.sharedMemory, .privateObject]
    private static let files: [RegionKind] = [.file, .privateFile]
    private static let huge: [RegionKind] = [.hugeShared, .hugePrivate]
    /// Whose faults a driver serves.
    private static let faulting: [RegionKind] = [
        .graphicsBuffer, .deviceBAR, .reservedMemory, .countedPFNMap, .mixedMap, .writeNotifyPFNMap, .daxFile, .udmabuf,
    ]

    static func action(
        _ name: String, _ place: Place, _ type: ValueType, _ meaning: String, example: String,
        _ parameters: [String] = [], answers: [Answer] = [.ok, .errno], kinds: [RegionKind] = RegionKind.allCases,
        triesOtherKinds: Bool = false
    ) -> Key {
        Key(
            name, place, type, .required, meaning, example: example,
            step: StepShape(
                parameters: parameters + ["expect"], answers: answers + [.anyOf, .anything], kinds: kinds,
                triesOtherKinds: triesOtherKinds))
    }

    private static let guestSteps: [Key] =
        [
            action(
                "write", .guestStep, .guestPlace, "the guest stores 8 bytes", example: "{write: blob+0x1000, value: 7}",
                ["value", "count", "stride"], answers: [.ok, .mmio] + exits + [.errno]),
            action(
                "read", .guestStep, .guestPlace, "the guest loads 8 bytes", example: "{read: 0x10000000, expect: 7}",
                ["count", "stride"], answers: [.ok, .value, .counting, .mmio] + exits + [.errno]),
            action(
                "fetch", .guestStep, .guestPlace, "the guest fetches an instruction", example: "{fetch: ram}",
                ["count", "stride"], answers: [.ok] + exits + [.errno]),
            mapGuestPage(.guestStep), preFault,
        ] + tableSteps
    static let exits: [Answer] = [.dirtyRingFull, .memoryFault, .pageFault]

    /// On the vCPU's thread, as in Linux, or on another.
    private static func mapGuestPage(_ place: Place) -> Key {
        action(
            "map_guest_page", place, .guestPlace, "KVM maps a guest page for itself and unmaps it (kvm_vcpu_map)",
            example: "{map_guest_page: ram, access: read}", ["access"])
    }

    private static let hostSteps: [Key] =
        userSteps + fileSteps + backgroundSteps + userFaultSteps + driverSteps + windowSteps + kvmSteps + consumerSteps
        + machineSteps

    private static let userSteps: [Key] = [
        action(
            "store", .hostStep, .regionPlace, "the VMM stores 8 bytes through its own mapping",
            example: "{store: ram+0x10, value: 7}", ["value"]),
        action(
            "load", .hostStep, .regionPlace, "the VMM loads 8 bytes", example: "{load: ram+0x10, expect: 7}",
            answers: [.ok, .value, .errno]),
        action(
            "munmap", .hostStep, .regionPlace, "munmap(2)", example: "{munmap: ram+4 KiB, length: 4 KiB}", ["length"]),
        action(
            "mprotect", .hostStep, .regionPlace, "mprotect(2)", example: "{mprotect: ram, protection: read}",
            ["length", "protection"]),
        action(
            "madvise", .hostStep, .regionPlace, "madvise(2)", example: "{madvise: ram, advice: dontneed}",
            ["length", "advice"], kinds: [.anonymous, .mixedMap] + memfds + files + [.secretMemory] + huge,
            triesOtherKinds: true),
        action(
            "mremap", .hostStep, .regionPlace,
            "mremap(2) with MREMAP_FIXED: the pages appear at another place, what is there goes",
            example: "{mremap: ram, length: 4 KiB, onto: window}", ["length", "onto"]),
        action(
            "pin", .hostStep, .regionPlace, "the VMM pins a page for DMA, for long (io_uring, VFIO), until `unpin`",
            example: "{pin: ram, access: write}", ["access"]),
        action("unpin", .hostStep, .regionPlace, "the DMA is over", example: "{unpin: ram}"),
        action("fork", .hostStep, .nothing, "the VMM forks; the child's steps follow", example: "fork"),
        action(
            "child_store", .hostStep, .regionPlace, "the youngest child stores 8 bytes",
            example: "{child_store: ram, value: 7}", ["value"]),
        action(
            "child_load", .hostStep, .regionPlace, "the youngest child loads 8 bytes",
            example: "{child_load: ram, expect: 7}", answers: [.ok, .value, .errno]),
        action("child_exit", .hostStep, .nothing, "the youngest child exits", example: "child_exit"),
        action(
            "age", .hostStep, .regionPlace, "reclaim looks at the region's young bits (clear_flush_young)",
            example: "{age: ram}", ["length"]),
    ]

    private static let fileSteps: [Key] = [
        action(
            "truncate", .hostStep, .region,
            "ftruncate(2) of what is behind the mapping: accesses beyond the end are SIGBUS",
            example: "{truncate: ram, size: 8 KiB}", ["size"], kinds: memfds + files + [.daxFile]),
        action(
            "punch_hole", .hostStep, .regionPlace,
            "fallocate(2) with FALLOC_FL_PUNCH_HOLE: the pages go, and read as zeros again",
            example: "{punch_hole: ram+4 KiB, length: 4 KiB}", ["length"], kinds: memfds + files + [.daxFile] + huge),
        action(
            "fsync", .hostStep, .region, "dirty pages become clean, and their entries read-only until the next write",
            example: "{fsync: dax}", kinds: files + [.daxFile]),
    ]

    /// Kinds whose faults the VMM can serve.
    private static let servable: [RegionKind] = [.anonymous] + memfds

    private static let userFaultSteps: [Key] = [
        action(
            "uffd_wait", .hostStep, .nothing, "read(2) of the userfaultfd: sleeps until there is a fault to serve",
            example: "uffd_wait"),
        action(
            "uffd_copy", .hostStep, .regionPlace, "UFFDIO_COPY: a page that begins with `value`, zeros behind it",
            example: "{uffd_copy: ram+4 KiB, value: 7}", ["value"], kinds: servable),
        action(
            "uffd_zeropage", .hostStep, .regionPlace, "UFFDIO_ZEROPAGE", example: "{uffd_zeropage: ram}",
            kinds: servable),
        action(
            "uffd_continue", .hostStep, .regionPlace, "UFFDIO_CONTINUE: maps the page that the memfd has",
            example: "{uffd_continue: shared}", kinds: servable),
        action(
            "uffd_protect", .hostStep, .regionPlace, "UFFDIO_WRITEPROTECT: writes wait from now on",
            example: "{uffd_protect: ram}", ["length"], kinds: servable),
        action(
            "uffd_unprotect", .hostStep, .regionPlace, "UFFDIO_WRITEPROTECT without its mode: they go on",
            example: "{uffd_unprotect: ram}", ["length"], kinds: servable),
    ]

    /// What the host does on its own, whichever task it is written under.
    private static let backgroundSteps: [Key] = [
        action(
            "reclaim", .hostStep, .number(counts),
            "pages are aged and taken back, the oldest first, until so many are free", example: "{reclaim: 16}"),
        action(
            "migrate", .hostStep, .regionPlace, "the pages move to other frames", example: "{migrate: ram}",
            ["length"]),
        action(
            "compact", .hostStep, .number(orders),
            "pages are moved until a block of 2^order is free: else ENOMEM", example: "{compact: 9}"),
        action(
            "merge_pages", .hostStep, .nothing, "equal pages that were advised `mergeable` become one (KSM)",
            example: "merge_pages"),
        action(
            "collapse_pages", .hostStep, .nothing, "small pages that were advised `hugepage` become huge ones",
            example: "collapse_pages"),
        action(
            "reap", .hostStep, .nothing,
            "the VMM is killed, and its private memory goes at once, by non-blocking notifiers", example: "reap"),
        action(
            "numa_hint", .hostStep, .regionPlace,
            "NUMA balancing makes the entries inaccessible until the next access", example: "{numa_hint: ram}",
            ["length"]),
        action(
            "memory_failure", .hostStep, .regionPlace, "the frame behind the page breaks",
            example: "{memory_failure: ram+4 KiB}"),
        action(
            "fail_allocation", .hostStep, .number(counts), "the page allocation that comes so many from now on fails",
            example: "{fail_allocation: 1}"),
        action(
            "fail_swap", .hostStep, .choice(transfers), "an I/O error of the swap device", example: "{fail_swap: read}"),
        action(
            "fail_disk", .hostStep, .region, "an I/O error of a file's disk",
            example: "{fail_disk: data, transfer: write}", ["transfer"], kinds: files),
        action(
            "signal", .hostStep, .choice(signals), "a signal reaches the VMM, or is handled by it",
            example: "{signal: plain}"),
        action(
            "free_hugepages", .hostStep, .size, "the pool's pages of this size that nobody uses, as sysfs tells",
            example: "{free_hugepages: 2 MiB, expect: 4}", answers: [.ok, .value, .errno]),
        action(
            "resv_hugepages", .hostStep, .size, "those of them that are promised to mappings",
            example: "{resv_hugepages: 2 MiB, expect: 1}", answers: [.ok, .value, .errno]),
    ]

    /// The VMM's half of virtio-gpu.
    private static let windowSteps: [Key] = [
        action(
            "map_blob", .hostStep, .regionPlace,
            "the VMM maps what is behind another region into the window (RESOURCE_MAP_BLOB): EBUSY where something is",
            example: "{map_blob: window+64 KiB, resource: blob}", ["resource"], kinds: [.blobWindow]),
        action(
            "unmap_blob", .hostStep, .regionPlace,
            "the VMM takes it out again (RESOURCE_UNMAP_BLOB): ENOENT where nothing begins",
            example: "{unmap_blob: window+64 KiB, expect: ENOENT}", kinds: [.blobWindow]),
    ]

    private static let driverSteps: [Key] = [
        action(
            "move", .hostStep, .region, "the driver moves its buffer", example: "{move: blob, to: device_memory}",
            ["to"], kinds: [.graphicsBuffer]),
        action(
            "evict", .hostStep, .region, "the driver evicts its buffer; the next access brings it back",
            example: "{evict: blob}", kinds: [.graphicsBuffer]),
        action(
            "free", .hostStep, .region, "the driver unmaps its buffer everywhere and gives its pages back",
            example: "{free: blob}", kinds: [.graphicsBuffer]),
        action(
            "driver_store", .hostStep, .regionPlace,
            "what is behind the mapping (GPU, device, file) stores 8 bytes, through no mapping",
            example: "{driver_store: blob+8, value: 7}", ["value"], kinds: driverKinds),
        action(
            "driver_load", .hostStep, .regionPlace, "what is behind the mapping loads 8 bytes",
            example: "{driver_load: blob, expect: 7}", answers: [.ok, .value, .errno], kinds: driverKinds),
        action(
            "fail_fault", .hostStep, .region, "the driver's fault handler gives an answer instead of doing its work",
            example: "{fail_fault: bar, answer: sigbus}", ["answer", "times"], kinds: faulting),
        action(
            "disable", .hostStep, .region, "memory decoding of the BAR is turned off: zapped, and faults fail",
            example: "{disable: bar}", kinds: [.deviceBAR]),
        action(
            "reset", .hostStep, .region, "the device is reset: zapped, its memory zeros; faults map it again",
            example: "{reset: bar}", kinds: [.deviceBAR]),
    ]

    private static let kvmSteps: [Key] = [
        action(
            "set_memory_region", .hostStep, .mapping(.slot),
            "KVM_SET_USER_MEMORY_REGION: makes a slot, moves it, or changes its flags",
            example: "{set_memory_region: {slot: 1, guest_phys_addr: 0x20000000, userspace_addr: ram}}"),
        action(
            "delete_memory_region", .hostStep, .slotID, "the same with size 0", example: "{delete_memory_region: 1}"),
        action(
            "get_dirty_log", .hostStep, .slotID, "KVM_GET_DIRTY_LOG",
            example: "{get_dirty_log: 0, expect: {pages: [0, 3]}}", answers: [.ok, .pages, .errno]),
        action(
            "clear_dirty_log", .hostStep, .slotID, "KVM_CLEAR_DIRTY_LOG of every page in the range",
            example: "{clear_dirty_log: 0, first_page: 64, num_pages: 64}", ["first_page", "num_pages"]),
        action(
            "enable_manual_protect", .hostStep, .choice(manualProtect),
            "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2; the value may be left out", example: "enable_manual_protect"),
        mapGuestPage(.hostStep),
        action(
            "get_guest_page", .hostStep, .guestPlace, "KVM takes a guest page's struct page and puts it (gfn_to_page)",
            example: "{get_guest_page: ram}", ["access"]),
    ]

    private static let consumerSteps: [Key] = [
        action(
            "precopy", .hostStep, .choice(precopySteps),
            "a step of a pre-copy migration, under `vmm:`; gives the pages copied", example: "{precopy: start}",
            answers: [.ok, .value, .errno]),
        action(
            "snapshot", .hostStep, .choice(snapshotKinds),
            "everything stands still and a snapshot is written, under `vmm:`; what it restores to is checked; gives the "
                + "pages written",
            example: "{snapshot: diff}", answers: [.ok, .value, .errno]),
        action(
            "restore", .hostStep, .nothing,
            "guest memory becomes what it was at the last snapshot, under `vmm:`; gives the pages that differed",
            example: "restore", answers: [.ok, .value, .errno]),
        action(
            "vmm_store", .hostStep, .regionPlace,
            "the VMM stores 8 bytes through its own mapping, as the device that it emulates, and marks the page in its log",
            example: "{vmm_store: ram+0x10, value: 7}", ["value"]),
        action(
            "dma_store", .hostStep, .regionPlace,
            "a device stores 8 bytes into the page that a `pin` there holds, and the VMM marks it: else EFAULT",
            example: "{dma_store: ram+0x10, value: 7}", ["value"]),
    ]

    /// What goes beside an action; one meaning everywhere.
    private static func parameters(_ place: Place) -> [Key] {
        let guest =
            [
                Key(
                    "count", place, .number(counts), .optional("1"),
                    "how many accesses; each next write stores one more", example: "16"),
                Key("stride", place, .size, .optional("4 KiB"), "bytes from one access to the next", example: "8"),
            ] + tableParameters
        let host = [
            Key("protection", place, .choice(protections), .required, "the new protection", example: "read"),
            Key("advice", place, .choice(advices), .required, "what to do", example: "dontneed"),
            Key("to", place, .choice(destinations), .required, "where the buffer goes", example: "device_memory"),
            Key("onto", place, .regionPlace, .required, "where the pages go", example: "ram+1 MiB"),
            Key("transfer", place, .choice(transfers), .required, "which transfer fails", example: "read"),
            Key("answer", place, .choice(driverAnswers), .required, "what it answers", example: "sigbus"),
            Key(
                "times", place, .number(0...1000), .optional("1"), "to how many faults; 0: it works again",
                example: "2"),
            Key("size", place, .size, .required, "the new size in bytes, whole pages", example: "8 KiB"),
            Key(
                "resource", place, .region, .required, "a graphics buffer or a memfd to map", example: "blob"),
            Key(
                "first_page", place, .number(word), .optional("0"), "first page of the slot to clear, a multiple of 64",
                example: "64"),
            Key(
                "num_pages", place, .number(word), .optional("to the end of the slot"),
                "a multiple of 64, or up to the slot's end", example: "64"),
        ]
        let both = [
            Key(
                "length", place, .size, .optional("to the end of the region, or of the slot"), "bytes, whole pages",
                example: "4 KiB"),
            Key("value", place, .number(word), .optional("1"), "what is stored", example: "0xabcd"),
            Key("access", place, .choice(accesses), .optional("write"), "what KVM wants it for", example: "read"),
            Key("expect", place, .answer, .optional("ok"), "what must come of it", example: "EFAULT"),
        ]
        return (place == .guestStep ? guest : host) + both
    }
}
