import Machine

// The steps on dirty rings, private memory, frame caches, and faults ahead of use and asynchronous ones.

extension Vocabulary {
    /// In the order of no and yes in `Plan.hasPrivateMemory`.
    static let machineTypes: [Choice] = [
        Choice("default", "no guest page is private"),
        Choice("sw_protected", "KVM_X86_SW_PROTECTED_VM: guest pages can be private; x86 only"),
    ]
    /// KVM judges which sizes are right.
    static let ringNumbers: ClosedRange<UInt64> = 0...virtualCPUs.upperBound - 1

    static let preFault = action(
        "prefault", .guestStep, .guestPlace,
        "KVM_PRE_FAULT_MEMORY: memory is mapped ahead of use; gives the bytes that are left",
        example: "{prefault: 0x10000000, length: 8 KiB, expect: 0}", ["length"], answers: [.ok, .value, .errno])

    static let machineSteps: [Key] = [
        action(
            "collect_ring", .hostStep, .number(ringNumbers),
            "the VMM reads a vCPU's dirty ring and marks what it has read; gives the guest frames (gfns)",
            example: "{collect_ring: 0, expect: {pages: [0, 3]}}", answers: [.ok, .pages, .errno]),
        action(
            "reset_rings", .hostStep, .nothing,
            "KVM_RESET_DIRTY_RINGS, after which the VMM copies what it has collected; gives the entries consumed",
            example: "{reset_rings: , expect: 2}", answers: [.ok, .value, .errno]),
        action(
            "set_private", .hostStep, .guestPlace,
            "KVM_SET_MEMORY_ATTRIBUTES: the guest's pages are private from now on",
            example: "{set_private: 0x10000000, length: 4 KiB}", ["length"]),
        action(
            "set_shared", .hostStep, .guestPlace, "the same: they are shared",
            example: "{set_shared: 0x10000000, length: 4 KiB}", ["length"]),
        action(
            "punch_private", .hostStep, .guestPlace,
            "fallocate(2) with FALLOC_FL_PUNCH_HOLE of the slot's guest_memfd: its pages there go",
            example: "{punch_private: shared, length: 4 KiB}", ["length"]),
        action(
            "cache_write", .hostStep, .guestPlace,
            "KVM stores 8 bytes through its frame cache of the page (gfn_to_pfn_cache), under `kvm:`",
            example: "{cache_write: ram+8, value: 7}", ["value"]),
        action(
            "cache_read", .hostStep, .guestPlace, "KVM loads 8 bytes through it, under `kvm:`",
            example: "{cache_read: ram+8, expect: 7}", answers: [.ok, .value, .errno]),
        action(
            "async_fetch", .hostStep, .nothing,
            "a page is fetched that a vCPU waits for, under `async_worker:`; EAGAIN: none is",
            example: "async_fetch"),
    ]
}
