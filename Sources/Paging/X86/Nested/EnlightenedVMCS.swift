import Frames
import GuestMemory
import HostMemory
import Synchrony

/// How an enlightened VMPTRLD ended. Kernel: `enum nested_evmptrld_status`.
public enum EnlightenedLoad: Sendable, Equatable {
    case disabled, succeeded
    /// VMfailInvalid.
    case failed
    /// #UD.
    case error
}

/// A VMCS in the guest hypervisor's memory, which it writes itself and marks what it has changed (Hyper-V's enlightened
/// VMCS). It stays mapped, for writing, from one VMPTRLD to the next. Spec: x86 6.3.
///
/// The vCPU's own task's; methods inside `withSlots`.
public final class EnlightenedVMCS {
    private unowned(unsafe) let cpu: VirtualCPU
    private var page = MappedPage()
    /// Kernel: `EVMPTR_INVALID`, `EVMPTR_MAP_PENDING`, or the address.
    public enum Pointer: Sendable, Equatable {
        case invalid, mapPending
        case at(GuestAddress)
    }
    public private(set) var pointer = Pointer.invalid
    /// The fields that the guest hypervisor says it has not changed. Kernel: `hv_clean_fields`, in the page.
    public private(set) var cleanFields: UInt32 = 0
    /// The MSR bitmap is merged anew with the next entry, clean or not.
    public private(set) var mustMergeBitmap = true
    public private(set) var identifiesHypervisor = false

    /// The revision of the format. Kernel: `KVM_EVMCS_VERSION`.
    public static let version: UInt32 = 1
    /// What KVM says of its own VMCS: some hypervisors put that there. Kernel: `VMCS12_REVISION`.
    public static let ownRevision: UInt32 = 0x11e5_7ed0

    public init(_ cpu: VirtualCPU) { self.cpu = cpu }

    public var isMapped: Bool { page.frame != nil }
    public var frame: HostFrame? { page.frame }

    /// Kernel: `nested_vmx_handle_enlightened_vmptrld`.
    ///
    /// - Parameters:
    ///   - address: what the guest hypervisor's assist page says; nil: the page or what it says is invalid.
    ///   - isEnabled: the hypervisor has asked for the feature.
    ///   - launches: VMLAUNCH, not VMRESUME.
    public func load(_ address: GuestAddress?, isEnabled: Bool, launches: Bool) -> EnlightenedLoad {
        guard isEnabled else { return .disabled }
        guard let address else {
            release()
            return .disabled
        }
        let changes = pointer != .at(address)
        if changes {
            release()
            guard page.map(address, by: cpu) else { return .error }
            let revision = page.bytes.map { ($0 + Int(address.offset)).load(as: UInt32.self) }
            guard revision == Self.version || revision == Self.ownRevision else {
                release()
                return .failed
            }
            pointer = .at(address)
            identifiesHypervisor = true
        }
        if changes || launches {
            cleanFields = 0
            mustMergeBitmap = true
        }
        return .succeeded
    }

    /// The state came from elsewhere: the page is mapped when the guest is entered next. Kernel:
    /// `vmx_set_nested_state` with `KVM_STATE_NESTED_EVMCS`.
    public func migrated() {
        release()
        pointer = .mapPending
    }

    /// The bitmap was merged, and the hypervisor's marks were read.
    public func used(clean fields: UInt32) {
        cleanFields = fields
        mustMergeBitmap = false
    }

    /// Nothing, if it never was mapped. Kernel: `nested_release_evmcs`.
    public func release() {
        // The map itself knows whether there is one; the pointer does not, as long as a page is only looked at.
        if pointer != .invalid || !SeriesPatch.mapTellsWhetherMapped.isUndone { page.unmap(by: cpu) }
        pointer = .invalid
        identifiesHypervisor = false
    }
}
