// X86/Nested: what KVM maps of the guest hypervisor's memory to run its guest. The vCPU is a model: the states and
// transitions are here that touch memory, no instruction set. Kernel: `vmx/nested.c`, `svm/nested.c`.
//
// It guarantees: a page that hardware uses by its address is pinned as long as hardware may use it, and is given back once;
// what a page is dirtied for is decided when it is mapped. Spec: x86 section 6.

import Frames
import GuestMemory
import HostMemory

/// A page of the guest hypervisor's that stays mapped, or none.
///
/// Nothing of it is inlined: Swift 6.3's optimiser stops over the optional map otherwise.
struct MappedPage: ~Copyable {
    private var map: HostMap?

    init() { map = nil }

    var frame: HostFrame? {
        @inline(never) get {
            switch map {
            case .some(let map): map.frame
            case .none: nil
            }
        }
    }
    var guestFrame: GuestFrame? {
        @inline(never) get {
            switch map {
            case .some(let map): map.guestFrame
            case .none: nil
            }
        }
    }
    var bytes: UnsafeMutableRawPointer? {
        @inline(never) get {
            switch map {
            case .some(let map): map.bytes
            case .none: nil
            }
        }
    }

    /// Gives back what is mapped and maps the page of `address`; whether that was possible. Caller inside `withSlots`.
    @inline(never)
    mutating func map(_ address: GuestAddress, writable: Bool = true, by cpu: VirtualCPU) -> Bool {
        unmap(by: cpu)
        do throws(Errno) {
            map = try cpu.vm.map(address.frame, writable: writable)
            return true
        } catch { return false }
    }

    /// Nothing, if nothing is mapped. Caller inside `withSlots`. Kernel: `kvm_vcpu_unmap`. Spec: X8, X9.
    @inline(never)
    mutating func unmap(by cpu: VirtualCPU) {
        if let map = map.take() { map.unmap(by: cpu) }
    }
}
