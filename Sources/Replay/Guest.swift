import Frames
import HostMemory
import TraceAudit

/// The guest of the recordings: what the program that drove KVM had put into slot 500.
struct Guest {
    static let base: UInt64 = 0xe000_0000
    static let taskState = base + 0x3000

    /// The first instruction of the loop that does an operation.
    static func code(_ operation: GuestRun.Operation) -> UInt64 {
        switch operation {
        case .write: base + 0x1000
        case .read: base + 0x1100
        case .lockedIncrement: base + 0x1200
        }
    }

    /// The OUT behind it.
    static func out(_ operation: GuestRun.Operation) -> UInt64 {
        code(operation) + (operation == .lockedIncrement ? 0xc : 0xb)
    }

    private let recorded: RecordedRun
    private let request: SlotRequest

    init(_ recorded: RecordedRun, _ request: SlotRequest) {
        self.recorded = recorded
        self.request = request
    }

    /// Writes code and page tables: 2 MiB one to one, or 4 KiB where the kernel shadowed a lowest table.
    func write(into space: AddressSpace) throws(Errno) {
        for operation in [GuestRun.Operation.write, .read, .lockedIncrement] {
            try store(Self.code(operation) - Self.base, 0x9090_9090_9090_9090, space)
        }
        try store(0x10000, (Self.base + 0x11000) | 0x27, space)
        for i in 0..<UInt64(4) {
            try store(0x11000 + i * 8, (Self.base + 0x12000 + i * 0x1000) | 0x27, space)
            for j in 0..<UInt64(512) {
                let address = i << 30 | j << 21
                try store(0x12000 + i * 0x1000 + j * 8, address | 0xe7, space)
            }
        }
        if !recorded.lowestTables.isEmpty {
            for j in UInt64(128)..<192 {
                let table = 0x10_0000 + (j - 128) * 0x1000
                try store(0x12000 + j * 8, (Self.base + table) | 0x27, space)
                for k in 0..<UInt64(512) { try store(table + k * 8, (j << 21 | k << 12) | 0x67, space) }
            }
        }
    }

    private func store(_ offset: UInt64, _ value: UInt64, _ space: AddressSpace) throws(Errno) {
        guard offset < request.size else { return }
        try space.store(UserAddress(request.hostAddress + offset), value)
    }
}
