import Frames
import Synchrony

/// What a driver's fault came to. Kernel: `vm_fault_t`.
public enum DriverFault: Sendable, Equatable {
    /// The entry stands, or may be made writable. Kernel: `VM_FAULT_NOPAGE`.
    case inserted
    /// Kernel: `VM_FAULT_SIGBUS`.
    case busError
    /// Kernel: `VM_FAULT_OOM`.
    case outOfMemory
    /// Drop `mmapLock`, call `waitForRetry`, fault again. Kernel: `VM_FAULT_RETRY`.
    case retry
}
