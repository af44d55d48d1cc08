import Frames
import HostMemory
import Synchrony

/// The processor's page-modification log: where a guest's address goes when D goes from 0 to 1 in an EPT leaf. 512 entries
/// of 8 bytes in one page of physical memory, filled from the last one down. Source: Intel SDM volume 3,
/// "Page-modification logging". Spec: generic's dirty log, x86 3.8.
///
/// Belongs to the vCPU's task, as its index does in the VMCS: whoever drains it does so while the guest is out.
public final class ModificationLog: @unchecked Sendable {
    // Unchecked: only the vCPU's own task touches it, which walks and drains in turn.
    public static let capacity = 512

    public let memory: PhysicalMemory
    /// The PML address: the page of the entries.
    public let frame: HostFrame
    /// The entry that is written next; after the last one, 0, it is 0xffff. Kernel: `GUEST_PML_INDEX`.
    public private(set) var index: UInt16

    /// The caller owns `frame`, which must exist.
    public init(memory: PhysicalMemory, frame: HostFrame) {
        precondition(memory.exists(frame), "the log's page is memory")
        self.memory = memory
        self.frame = frame
        index = UInt16(Self.capacity - 1)
    }

    /// Whether an access that must log exits instead, before it has changed anything.
    public var isFull: Bool { index >= UInt16(Self.capacity) }

    /// Entries written since the last reset.
    public var count: Int { isFull ? Self.capacity : Self.capacity - 1 - Int(index) }

    /// Empties the log. Kernel: `vmx_flush_pml_buffer`.
    public func reset() { index = UInt16(Self.capacity - 1) }

    /// The logged guest frame, the `number`-th that was written.
    public subscript(number: Int) -> GuestFrame {
        precondition(number >= 0 && number < count, "no such entry")
        return GuestAddress(memory.entry(Self.capacity - 1 - number, of: frame).load()).frame
    }

    /// Not when full.
    func append(_ address: GuestAddress) {
        precondition(!isFull, "a full log exits")
        memory.entry(Int(index), of: frame).store(address.frame.address.value)
        index &-= 1
    }
}
