/// Why a guest frame has no host frame. Kernel: `KVM_PFN_ERR_*`, `KVM_PFN_NOSLOT`. Spec: generic 1.3, I-18.
///
/// An error is a case of an enum, so it can't reach a page-table entry; `kernelEncoding` is for people who compare with
/// a kernel.
public enum TranslationError: Error, Equatable, Sendable, CaseIterable {
    /// No VMA, wrong permissions, GUP's -EFAULT or -ENOMEM, a refused pin. Kernel: `KVM_PFN_ERR_FAULT`.
    case fault
    /// The primary MMU says that the page is poisoned. Kernel: `KVM_PFN_ERR_HWPOISON`.
    case hardwarePoison
    /// A write to a read-only slot or through a read-only PFN-mapped entry. Kernel: `KVM_PFN_ERR_RO_FAULT`.
    case readOnly
    /// A signal stopped the lookup. Kernel: `KVM_PFN_ERR_SIGPENDING`.
    case signalPending
    /// The page needs sleeping and the caller can't. Only with `noWait`. Kernel: `KVM_PFN_ERR_NEEDS_IO`. Spec: I-19.
    case needsIO
    /// The guest frame is in no usable slot: MMIO, not an error. Kernel: `KVM_PFN_NOSLOT`.
    case noSlot

    public var kernelEncoding: UInt64 {
        switch self {
        case .fault: 0x7ff0_0000_0000_0000
        case .hardwarePoison: 0x7ff0_0000_0000_0001
        case .readOnly: 0x7ff0_0000_0000_0002
        case .signalPending: 0x7ff0_0000_0000_0003
        case .needsIO: 0x7ff0_0000_0000_0004
        case .noSlot: 0x8000_0000_0000_0000
        }
    }

    /// Kernel: `is_error_pfn`. NOSLOT is not an error.
    public var isError: Bool { self != .noSlot }
}

/// Linux error numbers that the core returns, negated by its callers where the kernel does.
// Linux's names, as they are.
// swift-format-ignore: AlwaysUseLowerCamelCase
public enum Errno: Int32, Error, Equatable, Sendable {
    case EIO = 5
    case E2BIG = 7
    case EAGAIN = 11
    case ENOMEM = 12
    case EACCES = 13
    case EFAULT = 14
    case EEXIST = 17
    case EINVAL = 22
    case EFBIG = 27
    case ENOSPC = 28
    case ENOENT = 2
    case EINTR = 4
    case ENXIO = 6
    case EBADF = 9
    case EBUSY = 16
    case EPERM = 1
    case EHWPOISON = 133
    case EOVERFLOW = 75
    case EOPNOTSUPP = 95
    case EREMOTEIO = 121
    case ENODEV = 19
}
