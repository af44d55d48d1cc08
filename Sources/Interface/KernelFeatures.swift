import CKVMInterface
import Frames
import GuestMemory
import IoctlScript
import Machine
import Paging

/// What a kernel has of what a build, a host or a version may lack. The model has what an x86 kernel of 6.13 with EPT has;
/// to compare it with a kernel, it takes that kernel's.
public struct KernelFeatures: Sendable, Equatable {
    /// A bit for each. Kernel: `KVM_CAP_VM_TYPES`.
    public var types: UInt64 = 1 << KVM_X86_DEFAULT_VM | 1 << KVM_X86_SW_PROTECTED_VM
    /// Kernel: `KVM_CAP_MULTI_ADDRESS_SPACE`; 1 where there is no system management mode.
    public var addressSpaces = 2
    /// Whether there is `KVM_SET_MEMORY_ATTRIBUTES` at all.
    public var attributes = true
    /// Kernel: `KVM_PRE_FAULT_MEMORY` of an ordinary VM.
    public var preFault = true
    /// Whether a VM without private memory can have slots with a `guest_memfd`, as since 6.18. The guest sees the slot's
    /// user memory there all the same.
    public var guestMemoryOfAll = false
    /// Bits of the addresses that slots may have. Kernel: `kvm_mmu_max_gfn`; 52 where there are no second-stage tables.
    public var slotAddressBits: UInt64 = 48
    /// Whether the guest's memory is translated in two stages. Without, each of a guest's large pages has tables of its own,
    /// kept as the shadow MMU keeps direct ones.
    public var isTwoStage = true
    /// Whether the host has a swap device.
    public var swaps = false
    /// Pages of the largest slot for whose tables the kernel has memory.
    public var slotPages = UInt64.max
    /// Bytes that a file may have, in the file system where scripts have theirs.
    public var largestFile = UInt64(Int64.max)
    /// Where a guest has page tables of its own, which the shadow MMU shadows; nil: its addresses are physical ones. Such a
    /// guest makes accesses of 8 bytes, in one VM.
    public var guest: GuestLayout?
    /// Kernel: `KVM_CAP_MAX_VCPU_ID`.
    public var cpuIdentities: UInt64 = 4096
    /// Answers of `KVM_CHECK_EXTENSION` that are the host's affair, by capability.
    public var answers: [UInt64: Int] = [:]

    public init() {}

    /// Those of the kernel that gave these answers.
    public init(_ capabilities: KernelCapabilities, slotAddressBits: UInt64, largestFile: UInt64) {
        self.slotAddressBits = slotAddressBits
        self.largestFile = largestFile
        func value(_ number: Int) -> Int64 { capabilities.device[UInt64(number)] ?? 0 }
        types = UInt64(bitPattern: value(KVM_CAP_VM_TYPES)) | 1 << KVM_X86_DEFAULT_VM
        addressSpaces = max(1, min(2, Int(value(KVM_CAP_MULTI_ADDRESS_SPACE))))
        attributes = value(KVM_CAP_MEMORY_ATTRIBUTES) != 0
        preFault = value(KVM_CAP_PRE_FAULT_MEMORY) != 0
        // What KVM answers there is whether it has two stages. Kernel: `tdp_enabled`, since 6.11.
        isTwoStage = preFault
        guestMemoryOfAll = (capabilities.vm[UInt64(KVM_CAP_GUEST_MEMFD)] ?? 0) != 0
        cpuIdentities = UInt64(max(1, value(KVM_CAP_MAX_VCPU_ID)))
        for number in Self.ofTheHost { answers[UInt64(number)] = Int(value(number)) }
    }

    /// Tables that hold all that slots may, and fill ahead what the kernel's do.
    var tables: StageTwoTables {
        if guest != nil { return .shadow(ShadowMMU(addressSpaces: addressSpaces)) }
        var configuration = TDPConfiguration()
        configuration.largestPage = .page1G
        configuration.cachesMMIO = false
        configuration.addressSpaces = addressSpaces
        configuration.levels = slotAddressBits > 48 ? 5 : 4
        configuration.slotAddressBits = slotAddressBits
        return isTwoStage ? .tdp(TDPMMU(configuration)) : .direct(ShadowMMU(direct: configuration))
    }

    /// Capabilities that say how large a host is, or that are not about memory.
    static let ofTheHost = [
        KVM_CAP_NR_VCPUS, KVM_CAP_MAX_VCPUS, KVM_CAP_ENABLE_CAP, KVM_CAP_VM_TYPES, KVM_CAP_MULTI_ADDRESS_SPACE,
    ]
}
