// What KVM itself reads and writes of guest memory: descriptors, tables, emulated accesses. It goes through the process's
// own mapping, as a load or store of the process would: no page is referenced, nothing is pinned, and what the process may
// not do KVM can't either. Read `GuestReads.swift` next.

import Frames
import HostMemory
import Synchrony

/// Guest memory as the VM sees it, or one vCPU. Kernel: `kvm_read_guest*` with address space 0, or `kvm_vcpu_read_guest*`
/// with the vCPU's. Spec: generic 2.1, 2.16.
struct GuestView {
    let vm: VirtualMachine
    /// Whose address space it is. Nil: the VM's own view.
    let cpu: VirtualCPU?
    /// The vCPU whose task writes, if it is one's. See `markDirty`.
    let writer: VirtualCPU?

    /// The VM's own view, used by the task of `writer`.
    init(_ vm: VirtualMachine, by writer: VirtualCPU? = nil) {
        self.vm = vm
        cpu = nil
        self.writer = writer
    }

    /// A vCPU's view, used by its own task.
    init(of cpu: VirtualCPU) {
        vm = cpu.vm
        self.cpu = cpu
        writer = cpu
    }

    /// Kernel: `gfn_to_memslot` or `kvm_vcpu_gfn_to_memslot`. Caller is inside a read-side section of the slots.
    func slot(_ frame: GuestFrame) -> MemorySlot? {
        if let cpu { return cpu.slot(containing: frame) }
        return vm.slot(containing: frame)
    }

    /// Kernel: `mark_page_dirty` or `kvm_vcpu_mark_page_dirty`.
    func markDirty(_ frame: GuestFrame, in slot: MemorySlot) { vm.markDirty(frame, in: slot, by: writer) }

    /// Runs `body` with the slot of `frame` inside a read-side section. EFAULT: there is none to be read, or to be written.
    /// Kernel: `gfn_to_hva_memslot_prot`, `gfn_to_hva_memslot`. Spec: generic 2.1.
    func withSlot<R>(
        of frame: GuestFrame, write: Bool, _ body: (MemorySlot, UserAddress) throws(Errno) -> R
    ) throws(Errno) -> R {
        let section = vm.slotReaders.enter()
        defer { vm.slotReaders.exit(section) }
        guard let slot = slot(frame), let address = slot.checkedAddress(of: frame, write: write) else {
            throw .EFAULT
        }
        return try body(slot, address)
    }
}

/// Cuts `count` bytes from `address` on at page boundaries and calls `body` for each piece: its frame, its offset there,
/// and which of the bytes it is. Ends with the first error: what came before stays done.
func forEachPage(
    _ address: GuestAddress, _ count: Int, _ body: (GuestFrame, UInt64, Range<Int>) throws(Errno) -> Void
) throws(Errno) {
    var done = 0
    while done < count {
        let next = address + UInt64(done)
        let part = done..<min(done + Int(pageSize - next.offset), count)
        try body(next.frame, next.offset, part)
        done = part.upperBound
    }
}
