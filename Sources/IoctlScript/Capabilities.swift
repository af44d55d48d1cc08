import CKVMInterface

/// Capabilities by name: KVM's, in small letters, without `KVM_CAP_`.
let capabilities: [(String, UInt64)] = [
    ("user_memory", KVM_CAP_USER_MEMORY),
    ("nr_vcpus", KVM_CAP_NR_VCPUS),
    ("nr_memslots", KVM_CAP_NR_MEMSLOTS),
    ("sync_mmu", KVM_CAP_SYNC_MMU),
    ("destroy_memory_region_works", KVM_CAP_DESTROY_MEMORY_REGION_WORKS),
    ("join_memory_regions_works", KVM_CAP_JOIN_MEMORY_REGIONS_WORKS),
    ("enable_cap", KVM_CAP_ENABLE_CAP),
    ("max_vcpus", KVM_CAP_MAX_VCPUS),
    ("readonly_mem", KVM_CAP_READONLY_MEM),
    ("enable_cap_vm", KVM_CAP_ENABLE_CAP_VM),
    ("check_extension_vm", KVM_CAP_CHECK_EXTENSION_VM),
    ("multi_address_space", KVM_CAP_MULTI_ADDRESS_SPACE),
    ("max_vcpu_id", KVM_CAP_MAX_VCPU_ID),
    ("immediate_exit", KVM_CAP_IMMEDIATE_EXIT),
    ("manual_dirty_log_protect2", KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
    ("dirty_log_ring", KVM_CAP_DIRTY_LOG_RING),
    ("binary_stats_fd", KVM_CAP_BINARY_STATS_FD),
    ("dirty_log_ring_acq_rel", KVM_CAP_DIRTY_LOG_RING_ACQ_REL),
    ("dirty_log_ring_with_bitmap", KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP),
    ("user_memory2", KVM_CAP_USER_MEMORY2),
    ("memory_fault_info", KVM_CAP_MEMORY_FAULT_INFO),
    ("memory_attributes", KVM_CAP_MEMORY_ATTRIBUTES),
    ("guest_memfd", KVM_CAP_GUEST_MEMFD),
    ("vm_types", KVM_CAP_VM_TYPES),
    ("pre_fault_memory", KVM_CAP_PRE_FAULT_MEMORY),
].map { (name: String, number: Int) in (name, UInt64(number)) }

/// What a kernel answers to `KVM_CHECK_EXTENSION`, by the capability's number: what the host or the build decides is read
/// from it, not assumed.
public struct KernelCapabilities: Sendable, Equatable {
    /// Asked of `/dev/kvm`.
    public var device: [UInt64: Int64] = [:]
    /// Asked of an ordinary VM.
    public var vm: [UInt64: Int64] = [:]
    public init() {}

    /// Asks whoever runs scripts.
    public init<E: Error>(answersOf run: (Script) throws(E) -> [Answer]) throws(E) {
        var names = Names()
        names.vms = ["vm"]
        names.cpus = [[]]
        let steps =
            [Step.createVM(vm: 0, type: 0)]
            + capabilities.flatMap { capability in
                [
                    Step.checkExtension(vm: nil, capability: capability.1),
                    .checkExtension(vm: 0, capability: capability.1),
                ]
            }
        let answers = try run(Script(lines: steps.map { Script.Line(number: 0, $0) }, names: names))
        for (step, answer) in zip(steps, answers) {
            guard case .checkExtension(let vm, let capability) = step, case .returned(let value) = answer.outcome else {
                continue
            }
            if vm == nil { device[capability] = value } else { self.vm[capability] = value }
        }
    }

    /// Every capability with what the device and a VM answer, in the order of the kernel's numbers.
    public var table: [(name: String, device: Int64, vm: Int64)] {
        capabilities.map { (name, number) in (name, device[number] ?? 0, vm[number] ?? 0) }
    }
}
