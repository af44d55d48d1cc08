import Audit
import Frames
import GuestMemory
import Hardware
import HostMemory
import Paging
import Synchrony

/// How an access of a guest with page tables of its own ended.
public enum PagedAccessResult: Sendable, Equatable {
    /// A load's value, or what stood there before a locked addition.
    case value(UInt64)
    case stored
    /// KVM did it in the guest's place.
    case emulated
    /// Userspace must emulate it. Kernel: `KVM_EXIT_MMIO`.
    case mmio
    /// The guest was not entered: userspace must reset the dirty ring and try again. Kernel: `KVM_EXIT_DIRTY_RING_FULL`.
    case dirtyRingFull
    /// The guest's own page fault.
    case pageFault(GuestPageFault)
    /// A nested guest's fault on its guest hypervisor's second-stage tables.
    case nestedExit(NestedExit)
    /// KVM_RUN failed.
    case failed(Errno)
}

/// What a paged guest does at an address.
public enum PagedAccess: Sendable, Equatable {
    case load
    case store(UInt64)
    case fetch
    case lockedAdd(UInt64)

    var kind: AccessKind {
        switch self {
        case .load: .read
        case .fetch: .execute
        case .store, .lockedAdd: .write
        }
    }
}

extension LinearPort {
    func perform(
        _ access: PagedAccess, _ address: UInt64, reached: (HostFrame) -> Void
    ) -> LinearPortResult {
        switch access {
        case .load: load(address, reached: reached)
        case .store(let value): store(address, value, reached: reached)
        case .fetch: fetch(address, reached: reached)
        case .lockedAdd(let value): lockedAdd(address, value, reached: reached)
        }
    }
}

extension VirtualCPU {
    /// Does `step` until it comes to something; nil, and a finding, if it has come to nothing `patience` times in a row.
    /// What is at `frame` is what the guest waits for. No lock held. Spec: X65.
    @inline(__always)
    func persevere<R>(_ patience: Int, at frame: GuestFrame, _ step: () -> R?) -> R? {
        defer { vm.runPostponedWork() }
        for round in 0..<patience {
            // A fault that was to be tried again waits for others. Kernel: `xfer_to_guest_mode_handle_work`. After the
            // second it waits for what it fails on, so that an explorer sees two tries and not a thousand.
            if round > 1 { isExplorerAttached ? vm.waitForProgress(at: frame) : yieldProcessor() }
            if let end = step() { return end }
        }
        vm.memory.journal?.add(Finding(.i13, "the guest faults again and again without progress", guest: frame))
        return nil
    }

    /// The emulator goes through the user's mapping; what it writes, `written` hears of: it may be a table. What isn't
    /// there is MMIO. Caller is inside `withSlots`.
    func emulate(
        _ access: PagedAccess, _ address: GuestAddress, written: (GuestAddress) -> Void
    ) -> PagedAccessResult {
        CPUStatistics.bump(statistics.insn_emulation)
        if let slot = slot(containing: address.frame), !slot.isInvalid {
            let place = slot.userAddress(of: address.frame) + address.offset
            func stored() -> PagedAccessResult {
                vm.markDirty(address.frame, in: slot, by: self)
                written(address)
                return .emulated
            }
            do throws(Errno) {
                switch access {
                case .load, .fetch: return .value(try vm.addressSpace.load(place))
                case .store(let value):
                    guard !slot.flags.readOnly else { break }
                    try vm.addressSpace.store(place, value)
                    return stored()
                case .lockedAdd(let value):
                    guard !slot.flags.readOnly else { break }
                    let old = try vm.addressSpace.load(place)
                    guard try vm.addressSpace.compareExchange(place, wide: true, expected: old, desired: old &+ value)
                    else { break }
                    return stored()
                }
            } catch {
                // The process may not do it either: whatever the reason, the emulator takes it for a device.
            }
        }
        CPUStatistics.bump(statistics.mmio_exits)
        return .mmio
    }
}
