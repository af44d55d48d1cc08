import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// The buffer into which a processor writes the guest address of each page whose D bit it sets, from the last entry down.
/// Source: Intel SDM volume 3, "Page-Modification Logging". Kernel: `vmx->pml_pg`, `GUEST_PML_INDEX`.
///
/// The vCPU's own task's: the processor writes only while it runs that vCPU's guest.
public struct ModificationLog: Sendable {
    public static let capacity = 512
    private var addresses: [UInt64]
    /// Where the next address goes. After the first entry it wraps to 0xffff: the buffer is full.
    public private(set) var index: UInt16

    init() {
        addresses = [UInt64](repeating: 0, count: Self.capacity)
        index = UInt16(Self.capacity - 1)
    }

    /// Whether the processor must leave the guest before it can set a D bit. Kernel: `EXIT_REASON_PML_FULL`.
    public var isFull: Bool { index >= UInt16(Self.capacity) }
    public var isEmpty: Bool { index == UInt16(Self.capacity - 1) }

    /// The processor sets D in the leaf of `address`. The buffer is not full.
    public mutating func log(_ address: GuestAddress) {
        precondition(!isFull, "a full log exits instead")
        addresses[Int(index)] = address.value & ~0xfff
        index &-= 1
    }

    /// Whether a write to `frame` waits in the buffer. For checks.
    func holds(_ frame: GuestFrame) -> Bool {
        let first = isFull ? 0 : Int(index) + 1
        for i in first..<Self.capacity where GuestAddress(addresses[i]).frame == frame { return true }
        return false
    }

    /// The entries, from the lowest used index up: the newest first, as 6.13 reads them. The log is empty afterwards.
    /// Kernel: `vmx_flush_pml_buffer`.
    mutating func take() -> [GuestAddress] {
        let first = isFull ? 0 : Int(index) + 1
        var taken: [GuestAddress] = []
        taken.reserveCapacity(Self.capacity - first)
        for i in first..<Self.capacity { taken.append(GuestAddress(addresses[i])) }
        index = UInt16(Self.capacity - 1)
        return taken
    }
}

extension TDPMMU {
    /// Whether the processor logs what a vCPU writes. Never for a nested guest: the guest hypervisor's log is software's.
    /// KVM switches it on and off with a request when the first slot is logged and the last is not; here the processor
    /// asks. Spec: x86 3.8.
    public func logsModifications(of cpu: VirtualCPU) -> Bool {
        configuration.modificationLogEntries != 0 && vm.isLogging && !state(of: cpu).isGuestMode
    }

    /// The processor sets D in a leaf of `address`: false, it must leave the guest first, for the log is full. Called by the
    /// vCPU's task in guest mode.
    public func logModification(_ address: GuestAddress, of cpu: VirtualCPU) -> Bool {
        let state = state(of: cpu)
        if state.modificationLog.isFull { return false }
        state.modificationLog.log(address)
        return true
    }

    /// Marks what the processor has logged. In each exit, but not out of a nested guest. A frame without a slot is left out,
    /// as everywhere. Kernel: `vmx_flush_pml_buffer`. Spec: x86 3.8, X43, X45.
    func drainLog(of cpu: VirtualCPU) {
        let state = state(of: cpu)
        guard !state.modificationLog.isEmpty, !state.isGuestMode else { return }
        drain(cpu, state.modificationLog.take())
    }

    /// Marks the frames of `addresses` in the slots' logs, in this order. Caller: the vCPU's task, outside of guest mode.
    func drain(_ cpu: VirtualCPU, _ addresses: [GuestAddress]) {
        vm.withSlots {
            for address in addresses {
                guard let slot = cpu.slot(containing: address.frame) else { continue }
                vm.markDirty(address.frame, in: slot, by: cpu)
            }
        }
    }
}
