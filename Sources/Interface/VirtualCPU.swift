import CKVMInterface
import Frames
import GuestMemory
import HostMemory
import Machine

/// What a guest's program does: the same access, again and again.
public struct GuestProgram: Sendable, Equatable {
    public var kind: AccessKind
    public var address: GuestAddress
    /// Bytes of one access: 1, 2, 4 or 8; the address is a multiple of it.
    public var size: UInt64
    public var count: UInt64
    /// Bytes from one access to the next, modulo 2^64.
    public var stride: UInt64
    /// What a write stores.
    public var value: UInt64
    /// KVM's instruction emulator makes the accesses. Spec: real-kvm, "A guest that runs natively".
    public var emulated: Bool
    public init(
        _ kind: AccessKind, _ address: GuestAddress, size: UInt64 = 8, count: UInt64 = 1, stride: UInt64 = 4096,
        value: UInt64 = 0, emulated: Bool = false
    ) {
        self.kind = kind
        self.address = address
        self.size = size
        self.count = count
        self.stride = stride
        self.value = value
        self.emulated = emulated
    }
}

/// A vCPU's descriptor, with the page that it shares with its user. Kernel: what `KVM_CREATE_VCPU` returns.
public final class VirtualCPU {
    /// The user's number for it.
    public let id: UInt64
    /// `GuestMemory`'s vCPU.
    public let core: GuestMemory.VirtualCPU
    private let runner: Runner
    unowned let vm: VirtualMachine
    /// Kernel: the first page of the descriptor's mapping.
    public let shared: UnsafeMutablePointer<kvm_run>

    /// What the guest does in the next runs.
    public private(set) var program: GuestProgram?
    /// Accesses that have ended.
    public private(set) var done: UInt64 = 0
    /// What the program's reads have returned.
    public private(set) var values: [UInt64] = []
    /// The access that an exit has left to the user.
    private var isPending = false

    /// What executes the guest's code.
    private enum Runner {
        case direct(GuestCPU)
        case paged(PagedGuest)
    }

    convenience init(id: UInt64, core: GuestCPU, vm: VirtualMachine) {
        self.init(id: id, core, .direct(core), vm)
    }

    /// With a guest that has page tables of its own.
    convenience init(id: UInt64, paged: PagedGuest, vm: VirtualMachine) {
        self.init(id: id, paged.cpu, .paged(paged), vm)
    }

    private init(id: UInt64, _ core: GuestMemory.VirtualCPU, _ runner: Runner, _ vm: VirtualMachine) {
        self.id = id
        self.core = core
        self.runner = runner
        self.vm = vm
        shared = .allocate(capacity: 1)
        shared.initialize(to: kvm_run())
    }

    deinit { shared.deallocate() }

    /// Of a guest without page tables.
    var directCore: GuestCPU? { if case .direct(let core) = runner { core } else { nil } }

    /// Gives the guest a new program, of aligned accesses; what the last one has left undone is forgotten.
    public func load(_ program: GuestProgram) {
        precondition([1, 2, 4, 8].contains(program.size), "an access of 1, 2, 4 or 8 bytes")
        precondition(program.address.value % program.size == 0, "an aligned access")
        precondition(program.count < 2 || program.stride % program.size == 0, "an aligned access")
        self.program = program
        done = 0
        values = []
        isPending = false
    }

    /// One ioctl of the vCPU's descriptor, as `VirtualMachine.ioctl`.
    public func ioctl(_ request: UInt32, _ argument: UnsafeMutableRawPointer?, by process: AddressSpace? = nil) -> Int {
        result { () throws(Errno) in
            try vm.core.checkCaller(process ?? vm.core.addressSpace)
            switch request {
            case KVM_RUN:
                guard argument == nil else { throw .EINVAL }
                return try run()
            case KVM_PRE_FAULT_MEMORY: return try preFault(argument)
            case KVM_GET_STATS_FD: return vm.descriptors.open(.statistics { [self] in statistics })
            default: return InterfaceErrno.noSuchRequest
            }
        }
    }

    // MARK: KVM_RUN

    /// Runs the guest until it needs its user. At its end the program writes to port 0x10: KVM_EXIT_IO. Spec: generic 7,
    /// real-kvm.
    private func run() throws(Errno) -> Int {
        completeAccess()
        if shared.pointee.immediate_exit != 0 { throw .EINTR }
        shared.pointee.exit_reason = UInt32(KVM_EXIT_UNKNOWN)
        guard let program else { return exitForOutput() }
        if case .paged(let guest) = runner { try guest.prepare(program, from: done) }
        while done < program.count {
            let address = program.address + done &* program.stride
            let result = program.emulated ? emulate(program, address) : perform(program, address)
            switch result {
            case .value(let value): if program.kind == .read { values.append(value) }
            case .stored, .emulated: break
            case .mmio: return program.kind == .execute ? exitForCode() : exitForMMIO(program, address)
            case .dirtyRingFull:
                shared.pointee.exit_reason = UInt32(KVM_EXIT_DIRTY_RING_FULL)
                return 0
            case .failed(let errno): throw exit(with: errno)
            }
            done += 1
            if case .paged(let guest) = runner, program.kind == .execute { try guest.prepare(program, from: done) }
        }
        if case .paged(let guest) = runner { guest.end(program) }
        return exitForOutput()
    }

    private func perform(_ program: GuestProgram, _ address: GuestAddress) -> AccessResult {
        let core: GuestCPU
        switch runner {
        case .paged(let guest): return guest.perform(program, address.value, index: done)
        case .direct(let cpu): core = cpu
        }
        let part = WordPart(address, program.size)
        let result = core.access(
            program.kind, part.word, value: program.value << part.shift, mask: part.mask)
        guard case .value(let word) = result else { return result }
        return .value(part.value(of: word))
    }

    /// The user has done what the last exit asked for. Kernel: `complete_userspace_io`.
    private func completeAccess() {
        guard isPending, let program else { return }
        isPending = false
        if program.kind == .read {
            let data = withUnsafeBytes(of: shared.pointee.mmio.data) { $0.loadUnaligned(as: UInt64.self) }
            values.append(data & WordPart.mask(program.size))
        }
        done += 1
    }

    /// Kernel: `KVM_EXIT_MMIO`.
    private func exitForMMIO(_ program: GuestProgram, _ address: GuestAddress) -> Int {
        isPending = true
        shared.pointee.exit_reason = UInt32(KVM_EXIT_MMIO)
        shared.pointee.mmio.phys_addr = address.value
        shared.pointee.mmio.len = UInt32(program.size)
        shared.pointee.mmio.is_write = program.kind == .write ? 1 : 0
        withUnsafeMutableBytes(of: &shared.pointee.mmio.data) {
            $0.storeBytes(of: program.kind == .write ? program.value & WordPart.mask(program.size) : 0, as: UInt64.self)
        }
        return 0
    }

    /// There is no instruction to emulate: the emulator gives up. Kernel: `prepare_emulation_failure_exit`.
    private func exitForCode() -> Int {
        shared.pointee.exit_reason = UInt32(KVM_EXIT_INTERNAL_ERROR)
        shared.pointee.internal.suberror = UInt32(KVM_INTERNAL_ERROR_EMULATION)
        shared.pointee.internal.ndata = 0
        return 0
    }

    private func exitForOutput() -> Int {
        shared.pointee.exit_reason = UInt32(KVM_EXIT_IO)
        shared.pointee.io.direction = UInt8(KVM_EXIT_IO_OUT)
        shared.pointee.io.size = 1
        shared.pointee.io.port = 0x10
        shared.pointee.io.count = 1
        shared.pointee.io.data_offset = 4096
        return 0
    }

    /// The run ends with `errno`. A poisoned page is a signal to the process, SIGBUS, which ends the run. Spec: generic 7.
    private func exit(with errno: Errno) -> Errno {
        if let fault = core.memoryFault {
            shared.pointee.exit_reason = UInt32(KVM_EXIT_MEMORY_FAULT)
            shared.pointee.memory_fault.flags = fault.flags
            shared.pointee.memory_fault.gpa = fault.address.value
            shared.pointee.memory_fault.size = fault.size
            return errno
        }
        switch errno {
        case .EINTR, .EHWPOISON:
            shared.pointee.exit_reason = UInt32(KVM_EXIT_INTR)
            return .EINTR
        default: return errno
        }
    }

    // MARK: KVM_PRE_FAULT_MEMORY

    /// What is left of the range is written back, whatever came of it. Spec: generic 6.3.
    private func preFault(_ argument: UnsafeMutableRawPointer?) throws(Errno) -> Int {
        let request = try copy(argument, into: kvm_pre_fault_memory())
        let range = PreFaultRange(address: GuestAddress(request.gpa), size: request.size, flags: request.flags)
        guard vm.features.preFault else {
            try range.check()
            // The shadow MMU has a root first. Recorded on 6.18.
            if case .paged(let guest) = runner { guest.cpu.reloadRoot() }
            throw .EOPNOTSUPP
        }
        let left = try vm.core.preFault(core, range)
        argument?.storeBytes(of: left.address.value, as: UInt64.self)
        argument?.storeBytes(of: left.size, toByteOffset: 8, as: UInt64.self)
        return 0
    }

    // MARK: The dirty ring

    /// The user's side of the ring, in the descriptor's mapping.
    private var reader: DirtyRingReader?

    /// Reads what is dirty, at most `limit` entries, and marks it to be reset. Nil: there is no ring. Its place in the
    /// descriptor can be mapped all the same; the access is SIGBUS.
    public func collectRing(atMost limit: Int = .max) -> [kvm_dirty_gfn]? {
        if reader == nil { reader = core.ring.map { DirtyRingReader($0) } }
        return reader?.collect(atMost: limit).map {
            kvm_dirty_gfn(flags: $0.flags, slot: $0.slot, offset: $0.offset)
        }
    }

    // MARK: The emulator

    /// The access through the process's mapping; no stage-2 entry is used or made. What can't be read or written that way
    /// is MMIO, whatever the reason; code can't be fetched from there. Spec: generic 2.16, section 7.
    private func emulate(_ program: GuestProgram, _ address: GuestAddress) -> AccessResult {
        // Little-endian: the first bytes of the word are the low ones.
        var word: UInt64 = program.value
        do throws(Errno) {
            guard program.kind == .write else {
                word = 0
                try withBytes(of: &word, program.size) { (bytes) throws(Errno) in
                    try core.readGuest(address, into: bytes)
                }
                return .value(word)
            }
            try withBytes(of: &word, program.size) { (bytes) throws(Errno) in
                try core.writeGuest(address, from: UnsafeRawBufferPointer(bytes))
            }
            return .emulated
        } catch {
            return .mmio
        }
    }
}

/// The first `size` bytes of `word`.
private func withBytes(
    of word: inout UInt64, _ size: UInt64, _ body: (UnsafeMutableRawBufferPointer) throws(Errno) -> Void
) throws(Errno) {
    var copy = word
    var failure: Errno?
    withUnsafeMutableBytes(of: &copy) { bytes in
        do throws(Errno) { try body(UnsafeMutableRawBufferPointer(rebasing: bytes[..<Int(size)])) } catch {
            failure = error
        }
    }
    if let failure { throw failure }
    word = copy
}

/// An access of up to 8 bytes as a part of the aligned word around it, which is what the model's accesses are.
private struct WordPart {
    let word: GuestAddress
    let shift: UInt64
    let mask: UInt64

    init(_ address: GuestAddress, _ size: UInt64) {
        word = GuestAddress(address.value & ~7)
        shift = (address.value & 7) * 8
        mask = Self.mask(size) << shift
    }

    func value(of word: UInt64) -> UInt64 { (word & mask) >> shift }

    static func mask(_ size: UInt64) -> UInt64 { size >= 8 ? .max : (1 << (size * 8)) - 1 }
}
