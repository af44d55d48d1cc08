import Frames

/// Kernels that answer a failed guest fault alike: the columns of section 7's table, split where a cell names only one.
/// An MMU names its own and asks here; nobody else decides. Spec: generic section 7.
public enum FaultFamily: Sendable, Equatable, CaseIterable {
    case x86
    case arm64
    case riscv
    case loongArch
    case mips
    /// Book3S HV, hash and radix.
    case powerPCHV
    case powerPCe500
    /// Book3S PR.
    case powerPCPR
}

/// Why a guest fault could not be served, as the fault handler knows it.
public enum FaultCondition: Sendable, Equatable {
    /// No slot, or (`KVM_PFN_NOSLOT`) one that went away meanwhile.
    case noSlot
    /// The slot is being deleted or moved.
    case invalidSlot
    /// A write to a read-only slot.
    case readOnlySlot
    /// The host's answer, in a slot that allows the access. `.readOnly` is a PFN-mapped page that the process can't write.
    case translation(TranslationError)
    /// The access wants private memory and the frame is shared, or the reverse; there is no private memory behind the
    /// frame; or the file of private memory failed with this errno. Only x86 has private memory (6.13).
    case privateMemory(Errno)
    /// The retry check failed.
    case stale
    /// No memory for tables.
    case noMemory
    /// The VM is dead.
    case dead
}

/// What the vCPU's thread sees.
public enum FaultAnswer: Sendable, Equatable {
    /// The access is decoded and goes to user space: `KVM_EXIT_MMIO`. x86 runs its emulator, which may find that there is
    /// memory after all.
    case emulate
    /// The guest runs again.
    case retry
    /// `KVM_RUN` fails with this errno.
    case fail(Errno)
    /// `KVM_RUN` fails with this errno and says where: `KVM_EXIT_MEMORY_FAULT`.
    case memoryFault(Errno)
    /// SIGBUS (`BUS_MCEERR_AR`) for the user address, then the guest runs again: in effect EINTR.
    case busError
    /// `KVM_EXIT_INTR` and EINTR.
    case interrupted
    /// The guest gets an abort or an exception: an instruction can't be fetched from a device.
    case guestException

    /// For a handler. A signal is the caller's to send: `.failed(.EHWPOISON)` stands for it.
    public var outcome: FaultOutcome {
        switch self {
        case .emulate: .emulate
        case .retry: .retry
        case .fail(let errno): .failed(errno)
        case .memoryFault(let errno): .memoryFault(errno)
        case .busError: .failed(.EHWPOISON)
        case .interrupted: .failed(.EINTR)
        case .guestException: .failed(.EFAULT)
        }
    }
}

extension FaultFamily {
    /// The table, by rows.
    public func answer(_ condition: FaultCondition, _ access: AccessKind) -> FaultAnswer {
        switch condition {
        case .stale: .retry
        case .privateMemory(let errno): self == .x86 ? .memoryFault(errno) : untranslatable
        case .dead: .fail(.EIO)
        case .noSlot: device(access)
        // x86 makes no MMIO of a slot whose entries may still exist; the others look the user address up first, and
        // find an error value.
        case .invalidSlot: self == .x86 ? .retry : device(access)
        case .readOnlySlot: readOnlySlot(access)
        case .noMemory: emulatesErrors ? .emulate : .fail(.ENOMEM)
        case .translation(let error): answer(error, access)
        }
    }

    /// LoongArch and MIPS make MMIO of every error of the map step, want of memory too.
    private var emulatesErrors: Bool { self == .loongArch || self == .mips }

    /// Where no memory is.
    private func device(_ access: AccessKind) -> FaultAnswer {
        guard access == .execute else { return .emulate }
        switch self {
        // The emulator fetches, and fails there.
        case .x86: return .emulate
        case .riscv: return .fail(.EOPNOTSUPP)
        case .arm64, .loongArch, .mips, .powerPCHV, .powerPCe500, .powerPCPR: return .guestException
        }
    }

    private func readOnlySlot(_ access: AccessKind) -> FaultAnswer {
        switch self {
        case .x86, .arm64, .riscv, .loongArch, .mips: .emulate
        // They have no read-only slots; the error is that of the map step.
        case .powerPCHV: .fail(.EFAULT)
        case .powerPCe500, .powerPCPR: .fail(.EINVAL)
        }
    }

    private func answer(_ error: TranslationError, _ access: AccessKind) -> FaultAnswer {
        switch error {
        case .noSlot: device(access)
        case .readOnly: self == .x86 ? .emulate : untranslatable
        case .hardwarePoison: self == .x86 || self == .arm64 || self == .riscv ? .busError : untranslatable
        // Only x86 asks to be interrupted by ordinary signals; elsewhere the signal is fatal and the task dies.
        case .signalPending: self == .x86 ? .interrupted : untranslatable
        // Internal: who asks not to wait asks again.
        case .needsIO: untranslatable
        case .fault: untranslatable
        }
    }

    private var untranslatable: FaultAnswer {
        switch self {
        case .x86, .arm64, .riscv, .powerPCHV: .fail(.EFAULT)
        case .powerPCe500, .powerPCPR: .fail(.EINVAL)
        case .loongArch, .mips: .emulate
        }
    }
}
