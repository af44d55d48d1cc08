import Frames
import GuestMemory
import HostMemory

/// Each vCPU's tables in reserve, so that none has to be allocated under mmu_lock, where nobody may sleep.
/// Kernel: `kvm_mmu_memory_cache`, `vcpu->arch.mmu_page_cache`. Spec: arches X-15.
final class TableStock: @unchecked Sendable {
    // Unchecked: `shelves[n]` is touched by vCPU n's task alone, and by `empty` when no vCPU runs.
    /// Kernel: `KVM_MAX_VCPUS`.
    static let largestNumber = 1024
    private let shelves: UnsafeMutablePointer<[HostFrame]>

    init() {
        shelves = .allocate(capacity: Self.largestNumber)
        shelves.initialize(repeating: [], count: Self.largestNumber)
    }

    deinit {
        shelves.deinitialize(count: Self.largestNumber)
        shelves.deallocate()
    }

    /// Fills the vCPU's shelf up to `count` tables. False: memory is used up; what was found stays on the shelf.
    /// Caller: the vCPU's task, no lock held. Kernel: `kvm_mmu_topup_memory_cache`.
    func fill(_ cpu: VirtualCPU, to count: Int, from host: Host) -> Bool {
        precondition(cpu.number < Self.largestNumber, "a vCPU number beyond KVM_MAX_VCPUS")
        while shelves[cpu.number].count < count {
            guard let table = host.allocateTable(order: 0, fill: 0) else { return false }
            shelves[cpu.number].append(table)
        }
        return true
    }

    /// Takes one table, all zeros. The shelf was filled before the lock was taken.
    func take(_ cpu: VirtualCPU) -> HostFrame { shelves[cpu.number].removeLast() }

    /// Gives everything back.
    func empty(into host: Host) {
        for i in 0..<Self.largestNumber {
            let tables = shelves[i]
            shelves[i] = []
            for table in tables { host.freeTable(table) }
        }
    }
}
