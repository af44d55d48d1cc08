import Frames
import GuestMemory
import HostMemory

/// Whether the guest used a page lately. Spec: x86 3.9. Caller holds mmu_lock for writing (E1, E2).
///
/// Nothing is told to the page: the notifier's answer is the only report (X4). No flush: a stale TLB entry only means
/// that an access is missed (F6).
extension TDPMMU {
    /// Makes the leaves of `frames` old; whether any was young. Kernel: `kvm_tdp_mmu_age_gfn_range`.
    func ageLeaves(of frames: Range<GuestFrame>, in space: UInt8) -> Bool {
        switch vm.policy(for: .cleared) {
        case .precise(let policy): ageLeaves(of: frames, space, policy)
        case .tracked(let policy): ageLeaves(of: frames, space, policy)
        case .guess(let policy): ageLeaves(of: frames, space, policy)
        }
    }

    private func ageLeaves<P: ReferencePolicy>(of frames: Range<GuestFrame>, _ space: UInt8, _ policy: P) -> Bool {
        let loop = LeafLoop(self)
        var young = false
        for root in validRoots(of: space) {
            for run in view(root).runs(in: frames) where loop.age(run, policy) {
                young = true
            }
        }
        return young
    }

    /// Kernel: `kvm_tdp_mmu_test_age_gfn`.
    func anyAccessed(of frames: Range<GuestFrame>, in space: UInt8) -> Bool {
        let loop = LeafLoop(self)
        for root in validRoots(of: space) {
            for run in view(root).runs(in: frames) where loop.anyAccessed(run) { return true }
        }
        return false
    }
}
