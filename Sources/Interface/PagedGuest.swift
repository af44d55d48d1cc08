import Frames
import GuestMemory
import HostMemory
import IoctlScript
import Machine
import Paging

/// The slot with a guest's code and page tables, as an executor on a real kernel keeps it: every page of 2 MiB that a program
/// needs is mapped where it is. Spec: real-kvm, "A guest that runs natively".
final class GuestTables {
    private let layout: GuestLayout
    private let vm: GuestMemory.VirtualMachine
    /// Offset of the next page for a table.
    private var next: UInt64

    /// Beyond all that a script maps.
    private static let host = UserAddress(0x7000_0000_0000)
    // Present, writable, for user mode, accessed; of a leaf also dirty: the processor has nothing to write.
    private static let tableBits: UInt64 = 0x27
    private static let leafBits: UInt64 = 0xe7

    /// Makes the slot's memory, and the slot. Errors: those of mmap and of the slot's call.
    init(_ layout: GuestLayout, _ vm: GuestMemory.VirtualMachine) throws(Errno) {
        self.layout = layout
        self.vm = vm
        next = layout.tables
        // Shared, so that a fork leaves it alone. Kernel: MADV_DONTFORK.
        try vm.addressSpace.map(at: Self.host, length: layout.size, protection: .readWrite, backing: .anonymousShared)
        for program in [layout.reads, layout.writes] { try store(program.first, 0x9090_9090_9090_9090) }
        try map(layout.address)
        try setSlot(size: layout.size)
    }

    private func setSlot(size: UInt64) throws(Errno) {
        try vm.setMemoryRegion(
            MemoryRegion(
                slot: layout.slot, flags: SlotFlags(logDirtyPages: false, readOnly: false),
                guestAddress: GuestAddress(layout.address), size: size, userAddress: Self.host))
    }

    private func store(_ offset: UInt64, _ value: UInt64) throws(Errno) {
        try vm.addressSpace.store(Self.host + offset, value)
    }

    /// Maps the 2 MiB around an address. Where no page is left for a table, all tables begin anew, and the slot with them: no
    /// processor knows the old ones then.
    func map(_ address: UInt64) throws(Errno) {
        if try fits(address) { return }
        try setSlot(size: 0)
        for offset in stride(from: layout.root, to: layout.size, by: 8) { try store(offset, 0) }
        next = layout.tables
        _ = try fits(layout.address)
        guard try fits(address) else { throw .ENOMEM }
        try setSlot(size: layout.size)
    }

    /// False: no page is left.
    private func fits(_ address: UInt64) throws(Errno) -> Bool {
        var table = layout.root
        for shift in [39, 30] as [UInt64] {
            let place = table + (address >> shift & 511) * 8
            var entry = try vm.addressSpace.load(Self.host + place)
            if entry == 0 {
                guard next < layout.size else { return false }
                entry = (layout.address + next) | Self.tableBits
                next += 4096
                try store(place, entry)
            }
            table = (entry & 0x000f_ffff_ffff_f000) - layout.address
        }
        let place = table + (address >> 21 & 511) * 8
        guard try vm.addressSpace.load(Self.host + place) == 0 else { return true }
        try store(place, (address & ~0x1f_ffff) | Self.leafBits)
        return true
    }
}

/// A guest whose programs run on page tables of its own.
final class PagedGuest {
    let cpu: PagedCPU
    private let mmu: ShadowMMU
    private let layout: GuestLayout
    private let tables: GuestTables
    private var isLoaded = false

    init(_ cpu: PagedCPU, _ mmu: ShadowMMU, _ layout: GuestLayout, _ tables: GuestTables) {
        self.cpu = cpu
        self.mmu = mmu
        self.layout = layout
        self.tables = tables
    }

    private func code(_ program: GuestProgram) -> GuestLayout.Program {
        program.kind == .write ? layout.writes : layout.reads
    }

    /// What the executor does before a run; each piece of unknown code has a run of its own. Errors: those of the slot's call.
    func prepare(_ program: GuestProgram, from done: UInt64) throws(Errno) {
        let isCode = program.kind == .execute
        for index in done..<max(done, isCode ? min(program.count, done + 1) : program.count) {
            try tables.map(program.address.value &+ index &* program.stride)
        }
        guard !isLoaded else { return }
        isLoaded = true
        var registers = GuestRegisters.longMode(root: GuestAddress(layout.address + layout.root))
        registers.physicalAddressBits = UInt8(truncatingIfNeeded: min(52, layout.addressBits))
        mmu.load(registers, on: cpu)
    }

    /// One access: the program's first instruction must be there, and where a read's value goes.
    func perform(_ program: GuestProgram, _ address: UInt64, index: UInt64) -> AccessResult {
        cpu.memoryFault = nil
        switch program.kind {
        case .execute:
            let result = answer(cpu.access(.fetch, at: address))
            if result == .mmio { read(address, [.user, .fetch]) }
            // Two zero bytes are an instruction that changes what its register points to. Intel SDM volume 2, ADD.
            if case .value(let code) = result, code & 0xffff == 0 {
                _ = cpu.access(.lockedAdd(0), at: layout.address + layout.scratch)
            }
            return result
        case .write:
            if let failure = fetch(program) { return failure }
            let result = answer(cpu.access(.store(program.value), at: address))
            if result == .mmio || result == .emulated { emulate(program, address) }
            return result
        case .read:
            if let failure = fetch(program) { return failure }
            let result = answer(cpu.access(.load, at: address))
            switch result {
            case .mmio: emulate(program, address)
            case .value(let value):
                let place = layout.address + layout.values + index % 512 * 8
                let stored = answer(cpu.access(.store(value), at: place))
                guard stored == .stored else { return stored }
            default: break
            }
            return result
        }
    }

    /// Nil: the program's code is there.
    private func fetch(_ program: GuestProgram) -> AccessResult? {
        let result = answer(cpu.access(.fetch, at: layout.address + code(program).first))
        if case .value = result { return nil }
        return result
    }

    private func answer(_ result: PagedAccessResult) -> AccessResult {
        switch result {
        case .value(let value): .value(value)
        case .stored: .stored
        case .emulated: .emulated
        case .mmio: .mmio
        case .dirtyRingFull: .dirtyRingFull
        case .failed(let errno): .failed(errno)
        // The guest's tables map all that its programs reach.
        case .pageFault, .nestedExit: .failed(.EFAULT)
        }
    }

    /// KVM reads the instruction of the access, and walks for its operand, unless it remembers the operand's page as one that
    /// no slot has; page 0 it can't remember. Kernel: `vcpu_mmio_gva_to_gpa`, `vcpu_match_mmio_gva`.
    private func emulate(_ program: GuestProgram, _ address: UInt64) {
        read(layout.address + code(program).access, [.user, .fetch])
        let frame = GuestAddress(address).frame
        let isRemembered = frame.number != 0 && cpu.vm.withSlots { cpu.slot(containing: frame) == nil }
        if !isRemembered { read(address, program.kind == .write ? [.user, .write] : .user) }
    }

    private func read(_ address: UInt64, _ code: FaultCode) {
        cpu.vm.withSlots { _ = mmu.translate(cpu, address, code) }
    }

    /// The OUT at the end.
    func end(_ program: GuestProgram) {
        // Of unknown code there is none: its own exception ends it.
        guard program.kind != .execute else { return }
        cpu.walkForOutput(at: layout.address + code(program).out, taskState: layout.address + layout.taskState)
    }
}
