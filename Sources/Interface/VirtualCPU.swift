import CKVMInterface
import Frames
import GuestMemory
import HostMemory
import Machine

/// What a guest's program does: the same access, again and again.
public struct GuestProgram: Sendable, Equatable {
    public var kind: AccessKind
    public var address: GuestAddress
    /// Bytes of one access: 8; the address is a multiple of it.
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
    public let core: GuestCPU
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

    init(id: UInt64, core: GuestCPU, vm: VirtualMachine) {
        self.id = id
        self.core = core
        self.vm = vm
        shared = .allocate(capacity: 1)
        shared.initialize(to: kvm_run())
    }

    deinit { shared.deallocate() }

    /// Gives the guest a new program, of aligned accesses; what the last one has left undone is forgotten.
    public func load(_ program: GuestProgram) {
        precondition(program.size == 8 && program.address.value % 8 == 0, "accesses of 8 bytes, aligned")
        precondition(program.count < 2 || program.stride % 8 == 0, "accesses of 8 bytes, aligned")
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
        while done < program.count {
            let address = program.address + done &* program.stride
            let result = program.emulated ? emulate(program, address) : perform(program, address)
            switch result {
            case .value(let value): values.append(value & Self.mask(program.size))
            case .stored, .emulated: break
            case .mmio: return exitForMMIO(program, address)
            case .failed(let errno): throw exit(with: errno)
            }
            done += 1
        }
        return exitForOutput()
    }

    private func perform(_ program: GuestProgram, _ address: GuestAddress) -> AccessResult {
        core.access(program.kind, address, value: program.value)
    }

    /// The user has done what the last exit asked for. Kernel: `complete_userspace_io`.
    private func completeAccess() {
        guard isPending, let program else { return }
        isPending = false
        if program.kind == .read {
            values.append(withUnsafeBytes(of: shared.pointee.mmio.data) { $0.loadUnaligned(as: UInt64.self) })
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
            $0.storeBytes(of: program.kind == .write ? program.value & Self.mask(program.size) : 0, as: UInt64.self)
        }
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
        switch errno {
        case .EINTR, .EHWPOISON:
            shared.pointee.exit_reason = UInt32(KVM_EXIT_INTR)
            return .EINTR
        default: return errno
        }
    }

    private static func mask(_ size: UInt64) -> UInt64 { size >= 8 ? .max : (1 << (size * 8)) - 1 }

    // MARK: The emulator

    /// The access through the process's mapping; no stage-2 entry is used or made. What can't be read or written that way
    /// is MMIO, whatever the reason. Code can't be fetched from there. Spec: generic 2.16, section 7.
    private func emulate(_ program: GuestProgram, _ address: GuestAddress) -> AccessResult {
        let memory = vm.core
        return memory.withSlots {
            guard let slot = core.slot(containing: address.frame), !slot.isInvalid,
                program.kind != .write || !slot.flags.readOnly
            else { return .mmio }
            let place = slot.userAddress(of: address.frame) + address.offset
            do throws(Errno) {
                guard program.kind == .write else { return .value(try memory.addressSpace.load(place)) }
                try memory.addressSpace.store(place, program.value)
                memory.markDirty(address.frame, in: slot)
                return .emulated
            } catch {
                return .mmio
            }
        }
    }
}
