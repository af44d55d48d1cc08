// X86/APIC: the page by which a processor with APIC virtualisation knows the guest's local APIC. The guest finds it at
// 0xFEE0_0000 as it finds any memory; an access that ends at exactly this host page the processor turns into one to the
// virtual APIC. So the page's *host* address stands in a field of the VMCS, beside all tables.
//
// It guarantees: the page is not pinned. The host may move it as any page; then every vCPU looks again, before it runs.
// Spec: x86 6.4, 2.7 step 5.

import Frames
import GuestMemory
import HostMemory
import Synchronization
import Synchrony

/// The one page of a VM. Kernel: `apic_access_memslot_enabled`, `apicv_inhibit_reasons`.
final class APICAccessPage: Sendable {
    /// `VirtualMachine.userSlots` + 1. Every fault asks, so it is no stored property, which would have to be made first.
    /// Kernel: `APIC_ACCESS_PAGE_PRIVATE_MEMSLOT`.
    @inline(__always) static var slot: UInt16 { 32765 }
    /// Kernel: `APIC_DEFAULT_PHYS_BASE`.
    @inline(__always) static var frame: GuestFrame { GuestFrame(0xfee00) }

    /// Where the process has the page; 0: nowhere. Written under slots_lock, or when no vCPU runs any more.
    fileprivate let address = Atomic<UInt64>(0)
    /// The APIC is virtualised. Kernel: `kvm_apicv_activated`. Any task.
    fileprivate let isVirtualized = Atomic<Bool>(true)
}

extension TDPMMU {
    /// Whether vCPUs find their APIC through the processor. Any task.
    public var virtualizesAPIC: Bool { apic.isVirtualized.load(ordering: .acquiring) }

    /// Gives the VM its page: shared anonymous memory of KVM's own, in a slot that is not the user's. Nothing is fetched;
    /// memory that can't be had shows with the first access. A second call does nothing. `address`: a free page of the
    /// process; Linux looks for one itself. Takes slots_lock; may sleep. Kernel: `kvm_alloc_apic_access_page`.
    public func makeAPICAccessPage(at address: UserAddress) throws(Errno) {
        precondition(UInt32(APICAccessPage.slot) == VirtualMachine.userSlots + 1)
        guard apic.address.load(ordering: .relaxed) == 0 else { return }
        try vm.addressSpace.map(
            at: address, length: pageSize, protection: .readWrite, backing: .anonymousShared)
        do throws(Errno) {
            try vm.setInternalRegion(
                MemoryRegion(
                    slot: UInt32(APICAccessPage.slot), guestAddress: APICAccessPage.frame.address, size: pageSize,
                    userAddress: address))
        } catch {
            unmap(address)
            throw error
        }
        apic.address.store(address.value, ordering: .relaxed)
        if SeriesPatch.apicPageIsNotFetched.isUndone { try fetchAPICPage() }
    }

    /// As it was before patch 36 of the series.
    private func fetchAPICPage() throws(Errno) {
        let isThere = vm.withSlots {
            guard let page = vm.page(of: APICAccessPage.frame) else { return false }
            page.releaseUnused()
            return true
        }
        if !isThere { throw .EFAULT }
    }

    /// The mapping was KVM's own. The VM ends. Kernel: `kvm_arch_destroy_vm`.
    func unmapAPICPage() {
        let address = apic.address.load(ordering: .relaxed)
        guard address != 0 else { return }
        apic.address.store(0, ordering: .relaxed)
        unmap(UserAddress(address))
    }

    private func unmap(_ address: UserAddress) {
        do throws(Errno) {
            try vm.addressSpace.unmap(address..<(address + pageSize))
        } catch {
            // The process has exited, and its memory with it.
        }
    }

    /// Whether the processor turns accesses into those of the virtual APIC. While it does not, every access must be
    /// emulated, so none may find the page: what is mapped goes. Faults that have seen the APIC virtualised are stale then.
    /// No lock held. Kernel: `__kvm_set_or_clear_apicv_inhibit`.
    public func setAPICVirtualization(_ isOn: Bool) {
        let old = apic.isVirtualized.exchange(isOn, ordering: .acquiringAndReleasing)
        guard old, !isOn else { return }
        let end = APICAccessPage.frame.advanced(by: 1)
        vm.invalidate(APICAccessPage.frame..<end) { frames in
            var flush = false
            for space in 0..<vm.addressSpaceCount where zapLeaves(of: frames, in: UInt8(space)) { flush = true }
            return flush
        }
    }

    /// What a fault on the page comes to beside memory; nil: it is memory like any other. For a nested guest there is
    /// nothing here, and its access is emulated: its tree is another one, so the marker is in nobody's way. While the APIC
    /// is not virtualised it is emulated too, and nothing is left behind that would outlive that. No page is owned.
    /// Kernel: a part of `kvm_mmu_faultin_pfn`. Spec: x86 2.7 step 5.
    @inline(never)
    func serveAPIC(
        _ cpu: VirtualCPU, _ root: HostFrame, _ fault: GuestFault, _ reserve: inout TableReserve
    ) -> FaultOutcome? {
        if state(of: cpu).isGuestMode { return serveNoSlot(cpu, root, fault, &reserve) }
        return virtualizesAPIC ? nil : .emulate
    }

    /// The frame at 0xFEE00 of address space `space` loses its host page. Caller holds mmu_lock for writing, in a section
    /// of the slots. Kernel: a part of `kvm_unmap_gfn_range`. Spec: F16.
    func apicPageIsUnmapped(in space: UInt8) {
        guard vm.slot(containing: APICAccessPage.frame, in: space)?.id == APICAccessPage.slot else { return }
        vm.postToAllCPUs(VirtualCPU.Request.reloadAPICPage)
    }
}
