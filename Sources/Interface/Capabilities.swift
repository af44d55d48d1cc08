import CKVMInterface
import Frames
import GuestMemory
import HostMemory

/// What the device and a VM can do. Spec: generic 3.8.
extension VirtualMachine {
    /// Kernel: `KVM_CHECK_EXTENSION` of a VM's descriptor.
    func checkExtension(_ capability: UInt64) -> Int {
        switch capability {
        case UInt64(KVM_CAP_MULTI_ADDRESS_SPACE) where features.addressSpaces > 1:
            return core.addressSpaceCount
        case UInt64(KVM_CAP_MEMORY_ATTRIBUTES): return Int(core.supportedMemoryAttributes.bits)
        case UInt64(KVM_CAP_GUEST_MEMFD): return core.hasGuestMemory ? 1 : 0
        case UInt64(KVM_CAP_DIRTY_LOG_RING): return Int(core.largestDirtyRing(.totalStoreOrder))
        case UInt64(KVM_CAP_DIRTY_LOG_RING_ACQ_REL): return Int(core.largestDirtyRing(.acquireRelease))
        case UInt64(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP): return core.mmu.offersBackupBitmap ? 1 : 0
        case UInt64(KVM_CAP_READONLY_MEM): return core.mmu.allowsReadOnlySlots ? 1 : 0
        default: return features.checkDeviceExtension(capability)
        }
    }
    /// Kernel: `KVM_ENABLE_CAP` of a VM's descriptor. EINVAL for what can't be enabled.
    func enableCapability(_ request: kvm_enable_cap) throws(Errno) -> Int {
        switch Int(request.cap) {
        case KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
            // The second bit counts only with the first. Spec: generic 5.2.
            let bits = request.args.0
            let known = UInt64(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET)
            guard request.flags == 0, bits & ~known == 0 else { throw .EINVAL }
            var flags = ManualProtect()
            flags.enabled = bits & UInt64(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) != 0
            flags.initiallySet = bits & UInt64(KVM_DIRTY_LOG_INITIALLY_SET) != 0
            try core.setManualProtect(flags)
            return 0
        case KVM_CAP_DIRTY_LOG_RING:
            try core.enableDirtyRings(bytes: request.args.0, .totalStoreOrder)
            return 0
        case KVM_CAP_DIRTY_LOG_RING_ACQ_REL:
            try core.enableDirtyRings(bytes: request.args.0, .acquireRelease)
            return 0
        case KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP:
            guard request.flags == 0 else { throw .EINVAL }
            try core.enableBackupBitmap()
            return 0
        default: throw .EINVAL
        }
    }
}

extension KernelFeatures {
    /// Kernel: `KVM_CHECK_EXTENSION` of `/dev/kvm`. Capabilities that have nothing to do with memory are 0.
    public func checkDeviceExtension(_ capability: UInt64) -> Int {
        if let answer = answers[capability] { return answer }
        guard let capability = Int(exactly: capability) else { return 0 }
        switch capability {
        case KVM_CAP_USER_MEMORY, KVM_CAP_USER_MEMORY2, KVM_CAP_DESTROY_MEMORY_REGION_WORKS,
            KVM_CAP_JOIN_MEMORY_REGIONS_WORKS, KVM_CAP_SYNC_MMU, KVM_CAP_READONLY_MEM, KVM_CAP_IMMEDIATE_EXIT,
            KVM_CAP_CHECK_EXTENSION_VM, KVM_CAP_ENABLE_CAP_VM, KVM_CAP_BINARY_STATS_FD, KVM_CAP_MEMORY_FAULT_INFO:
            return 1
        case KVM_CAP_NR_MEMSLOTS: return Int(GuestMemory.VirtualMachine.userSlots)
        case KVM_CAP_MULTI_ADDRESS_SPACE: return addressSpaces
        case KVM_CAP_NR_VCPUS, KVM_CAP_MAX_VCPUS: return VirtualMachine.mostCPUs
        case KVM_CAP_MAX_VCPU_ID: return Int(cpuIdentities)
        case KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
            return KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET
        case KVM_CAP_VM_TYPES: return Int(types)
        case KVM_CAP_MEMORY_ATTRIBUTES: return attributes ? Int(MemoryAttributes.isPrivate.bits) : 0
        case KVM_CAP_GUEST_MEMFD: return 1
        case KVM_CAP_PRE_FAULT_MEMORY: return preFault ? 1 : 0
        case KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL:
            return Int(DirtyRing.mostEntries * DirtyRingEntry.bytes)
        default: return 0
        }
    }
}
