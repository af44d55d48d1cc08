/// Where an executor keeps the guest's code and page tables: in a slot that no script names, at guest addresses that are one to
/// one with the guest's own. Offsets are from the slot's first byte.
public struct GuestLayout: Sendable, Equatable {
    /// A program that makes accesses of 8 bytes.
    public struct Program: Sendable, Equatable {
        public var first: UInt64
        /// The instruction of the access, and the OUT that ends the program.
        public var access: UInt64
        public var out: UInt64
        public init(first: UInt64, access: UInt64, out: UInt64) {
            self.first = first
            self.access = access
            self.out = out
        }
    }

    public var slot: UInt32
    /// The first guest address.
    public var address: UInt64
    public var size: UInt64
    /// Bits of the guest's physical addresses.
    public var addressBits: UInt32
    public var reads: Program
    public var writes: Program
    /// The processor's task state, all zeros.
    public var taskState: UInt64
    /// Where all registers point while unknown code is executed.
    public var scratch: UInt64
    /// Where a program puts what it has read.
    public var values: UInt64
    /// The topmost page table, and the first of the others.
    public var root: UInt64
    public var tables: UInt64

    public init(
        slot: UInt32, address: UInt64, size: UInt64, addressBits: UInt32, reads: Program, writes: Program,
        taskState: UInt64, scratch: UInt64, values: UInt64, root: UInt64, tables: UInt64
    ) {
        self.slot = slot
        self.address = address
        self.size = size
        self.addressBits = addressBits
        self.reads = reads
        self.writes = writes
        self.taskState = taskState
        self.scratch = scratch
        self.values = values
        self.root = root
        self.tables = tables
    }

    /// Whether a guest address is one of the slot's.
    public func contains(_ guestAddress: UInt64) -> Bool { guestAddress >= address && guestAddress - address < size }
}
