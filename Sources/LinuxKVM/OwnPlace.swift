import CLinuxKVM
import IoctlScript

/// Where the executor's own slot lies, with the guest's code and page tables: neither its number nor its addresses are any
/// that the script names.
struct OwnPlace: Equatable {
    var slot: UInt32
    var address: UInt64

    static let size = UInt64(fl_kvm_own_bytes)
    private static let firstSlot: UInt64 = 0x5fa1
    /// Below 2^36, where every guest has addresses; then beyond what slots of some size reach.
    private static let addresses: [UInt64] =
        (0..<252).map { 0xf_0000_0000 + $0 << 24 } + (0..<64).map { 0x20_0000_0000 + $0 << 30 }

    init() {
        slot = UInt32(Self.firstSlot)
        address = Self.addresses[0]
    }

    /// The first place that the script leaves free. There is one but for scripts that mean to take them all, whose calls
    /// then meet the executor's slot.
    init(beside script: Script, width: UInt32) {
        var slots: Set<UInt64> = []
        var ranges: [ClosedRange<UInt64>] = []
        for line in script.lines { line.step.collect(&slots, &ranges) }
        slot = UInt32((Self.firstSlot..<0x7ffb).first { !slots.contains($0) } ?? Self.firstSlot)
        let free = Self.addresses.first { start in
            start >> width == 0 && !ranges.contains { $0.overlaps(start...start + Self.size - 1) }
        }
        address = free ?? Self.addresses[0]
    }
}

extension GuestLayout {
    init(_ place: OwnPlace, width: UInt32) {
        func page(_ number: Int) -> UInt64 { UInt64(number) << 12 }
        func program(_ writes: Int32) -> Program {
            let program = fl_kvm_program_of(writes, 8)
            let code = page(fl_kvm_own_code)
            return Program(first: code + program.first, access: code + program.access, out: code + program.out)
        }
        self.init(
            slot: place.slot, address: place.address, size: OwnPlace.size, addressBits: width,
            reads: program(0), writes: program(1), taskState: page(fl_kvm_own_task),
            scratch: page(fl_kvm_own_scratch) + 2048, values: page(fl_kvm_own_values), root: page(fl_kvm_own_root),
            tables: page(fl_kvm_own_tables))
    }
}

extension fl_kvm_place {
    init(_ place: OwnPlace) { self.init(slot: place.slot, guest_address: place.address) }
}

extension Step {
    /// The slots and guest addresses that the step names.
    fileprivate func collect(_ slots: inout Set<UInt64>, _ ranges: inout [ClosedRange<UInt64>]) {
        func range(_ start: UInt64, _ size: UInt64) {
            if size > 0 { ranges.append(start...sum(start, size - 1)) }
        }
        switch self {
        case .setRegion(_, let region, _):
            slots.insert(region.slot)
            range(region.guestAddress, region.size)
        case .getDirtyLog(_, let slot, _): slots.insert(slot)
        case .clearDirtyLog(_, let pages): slots.insert(pages.slot)
        case .setAttributes(_, let address, let size, _, _): range(address, size)
        case .preFault(_, let address, let size, _): range(address, size)
        case .guest(_, let access): ranges += access.ranges
        default: break
        }
    }
}

extension GuestAccess {
    /// What it may reach; a stride of more than 2^63 goes downwards.
    fileprivate var ranges: [ClosedRange<UInt64>] {
        let (count, stride) = (repetition.count, Int64(bitPattern: repetition.stride))
        guard count > 0 else { return [] }
        if count <= 4096, stride.magnitude > OwnPlace.size {
            return (0..<count).map { index in
                let start = address &+ index &* repetition.stride
                return start...sum(start, size - 1)
            }
        }
        let (distance, overflow) = (count - 1).multipliedReportingOverflow(by: stride.magnitude)
        if stride < 0 {
            let first = overflow || distance > address ? 0 : address - distance
            return [first...sum(address, size - 1)]
        }
        return [address...sum(overflow ? .max : sum(address, distance), size - 1)]
    }
}

/// 2^64 - 1 where the sum is more.
private func sum(_ a: UInt64, _ b: UInt64) -> UInt64 {
    let (sum, overflow) = a.addingReportingOverflow(b)
    return overflow ? .max : sum
}
