import Frames
import GuestMemory
import HostMemory
import Synchrony

/// What of a VMCS that the guest hypervisor made (vmcs12) names pages of its memory, and the controls that decide about
/// them. Kernel: `struct vmcs12`.
public struct NestedVMCS: Sendable, Equatable {
    /// With the control "virtualize APIC accesses".
    public var apicAccessPage: GuestAddress?
    /// With the control "use TPR shadow".
    public var virtualAPICPage: GuestAddress?
    /// With the control "process posted interrupts": 64 bytes, aligned to as many.
    public var postedInterruptDescriptor: GuestAddress?
    /// With the control "use MSR bitmaps".
    public var msrBitmap: GuestAddress?
    /// The controls "CR8-load exiting" and "CR8-store exiting", both.
    public var exitsOnCR8 = false
    public init() {}
}

/// How the entry of a nested guest went.
public enum NestedEntry: Sendable, Equatable {
    case entered
    /// Kernel: `KVM_EXIT_INTERNAL_ERROR`, `KVM_INTERNAL_ERROR_EMULATION`.
    case internalError
}

/// What the hardware's VMCS (vmcs02) has for a nested guest. Frames are those of pages that are mapped now, and of no
/// others: they are read from the maps. Spec: X66.
public struct MergedVMCS: Sendable, Equatable {
    public var apicAccessPage: HostFrame?
    /// Nil with `virtualAPICPoisoned`: the field holds a value with which the entry fails.
    public var virtualAPICPage: HostFrame?
    public var virtualAPICPoisoned = false
    public var usesTPRShadow = false
    public var postedInterruptDescriptor: HostFrame?
    /// Off: every access to an MSR exits.
    public var usesMSRBitmap = false
}

/// The pages that KVM keeps mapped for a vCPU's nested VMX guest. Kernel: `struct nested_vmx`. Spec: x86 6.2.
///
/// The vCPU's own task's. All methods: inside `withSlots`, no lock held.
public final class NestedVMX {
    private unowned(unsafe) let cpu: VirtualCPU
    private var apicAccess = MappedPage()
    private var virtualAPIC = MappedPage()
    private var postedInterrupt = MappedPage()
    private var virtualAPICPoisoned = false
    private var usesTPRShadow = false
    private var usesMSRBitmap = false
    /// A nested guest runs, or may: the hardware uses vmcs02.
    public private(set) var isInGuest = false
    /// The bitmap of the hardware's VMCS: a bit that is set exits. Kernel: `vmcs02.msr_bitmap`.
    public private(set) var mergedMSRBitmap = [UInt64](repeating: .max, count: 512)

    public init(_ cpu: VirtualCPU) { self.cpu = cpu }

    /// What hardware has; nothing while the guest hypervisor itself runs.
    public var merged: MergedVMCS {
        guard isInGuest else { return MergedVMCS() }
        return MergedVMCS(
            apicAccessPage: apicAccess.frame, virtualAPICPage: virtualAPIC.frame,
            virtualAPICPoisoned: virtualAPICPoisoned, usesTPRShadow: usesTPRShadow,
            postedInterruptDescriptor: postedInterrupt.frame, usesMSRBitmap: usesMSRBitmap)
    }

    /// Maps what the nested guest needs and enters it. Kernel: `nested_get_vmcs12_pages`, in the course of VMLAUNCH or of
    /// the first entry after a migration.
    ///
    /// - Parameter ownBitmap: which MSRs exit by KVM's own will: 512 words.
    public func enter(_ vmcs: NestedVMCS, ownBitmap: [UInt64]) -> NestedEntry {
        let dirties = !SeriesPatch.apicAccessPageIsDirtied.isUndone
        if let address = vmcs.apicAccessPage, !apicAccess.map(address, writable: dirties, by: cpu) {
            // The processor would read memory that nobody chose.
            putPages()
            return .internalError
        }
        usesTPRShadow = vmcs.virtualAPICPage != nil
        virtualAPICPoisoned = false
        if let address = vmcs.virtualAPICPage, !virtualAPIC.map(address, by: cpu) {
            // All that the shadow would save are exits that the guest hypervisor takes anyway; if it does not, or uses the
            // APIC access page, the entry must fail.
            if vmcs.exitsOnCR8, vmcs.apicAccessPage == nil { usesTPRShadow = false } else { virtualAPICPoisoned = true }
        }
        if let address = vmcs.postedInterruptDescriptor { _ = postedInterrupt.map(address, by: cpu) }
        usesMSRBitmap = vmcs.msrBitmap.map { merge($0, ownBitmap) } ?? false
        isInGuest = true
        return .entered
    }

    /// What either of the two wants to exit does. The map is for reading and ends here: the guest hypervisor's memory stays
    /// clean. Kernel: `nested_vmx_prepare_msr_bitmap`. Spec: X9.
    private func merge(_ address: GuestAddress, _ own: [UInt64]) -> Bool {
        precondition(own.count == 512, "an MSR bitmap is a page")
        var page = MappedPage()
        guard page.map(address, writable: false, by: cpu), let bytes = page.bytes else { return false }
        for i in 0..<512 { mergedMSRBitmap[i] = own[i] | bytes.load(fromByteOffset: i * 8, as: UInt64.self) }
        page.unmap(by: cpu)
        return true
    }

    /// The processor has left the nested guest, for whatever reason. It wrote the virtual APIC and the descriptor by their
    /// addresses, past every log; the APIC access page it never writes. Kernel: `nested_mark_vmcs12_pages_dirty`.
    public func leftGuest() {
        guard isInGuest else { return }
        for frame in [virtualAPIC.guestFrame, postedInterrupt.guestFrame] {
            if let frame, let slot = cpu.slot(containing: frame) { cpu.vm.markDirty(frame, in: slot, by: cpu) }
        }
    }

    /// The guest hypervisor goes on. The hardware's VMCS is switched first: what it holds may only then be given back.
    /// Kernel: `nested_vmx_vmexit`.
    public func exitToHypervisor() {
        isInGuest = false
        putPages()
    }

    /// VMXOFF, or the vCPU ends. Kernel: `free_nested`.
    public func free() { exitToHypervisor() }

    /// An interrupt for the nested guest is to be posted: the descriptor, or nil: it could not be mapped, and KVM gives up
    /// (an exit for an emulation that failed). Kernel: `vmx_complete_nested_posted_interrupt`.
    public func descriptor(of vmcs: NestedVMCS) -> UnsafeMutableRawPointer? {
        guard let address = vmcs.postedInterruptDescriptor, let bytes = postedInterrupt.bytes else { return nil }
        return bytes + Int(address.offset)
    }

    /// Kernel: `nested_put_vmcs12_pages`.
    private func putPages() {
        apicAccess.unmap(by: cpu)
        virtualAPIC.unmap(by: cpu)
        postedInterrupt.unmap(by: cpu)
    }
}
