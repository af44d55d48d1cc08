import Audit
import Frames
import GuestMemory
import HostMemory
import Machine
import SeededRandom

/// The memory of a guest that means harm, with random tables wherever the guest could put them: in ordinary memory, in a
/// slot that it may only read, in the graphics buffer (PFN-mapped, tail pages without counts); and addresses where
/// nothing is.
final class HostileMemory {
    private let arena: MappedArena
    let journal = Journal(keepsEvents: false)
    let host: Host
    let space: AddressSpace
    let vm: VirtualMachine
    private let buffer: GraphicsBuffer

    /// First guest frame and pages of each slot, and the process's page where it begins.
    private static let ram = (frame: 0 as UInt64, pages: 64 as UInt64, user: 0x1000 as UInt64)
    private static let readOnly = (frame: 0x100 as UInt64, pages: 8 as UInt64, user: 0x1100 as UInt64)
    private static let graphics = (frame: 0x200 as UInt64, pages: 8 as UInt64, user: 0x1200 as UInt64)
    /// Of ordinary memory: where tables are.
    private static let tables = 24 as UInt64

    /// Nil: this machine does not give 8 MiB.
    init?(_ mmu: SecondaryMMU) {
        let frames = 2048
        guard let arena = MappedArena(size: frames * 4096) else { return nil }
        self.arena = arena
        let memory = PhysicalMemory(arena: arena.base, ramFrames: frames, arenaIsZero: true, journal: journal)
        host = Host(memory: memory, transparentHugePages: false)
        space = AddressSpace(host: host)
        vm = VirtualMachine(addressSpace: space, mmu: mmu)
        guard let buffer = GraphicsBuffer(host, pages: Int(Self.graphics.pages), order: 2) else { return nil }
        self.buffer = buffer
        do throws(Errno) {
            try add(0, Self.ram, .anonymous, SlotFlags())
            try add(1, Self.readOnly, .anonymous, SlotFlags(readOnly: true))
            try add(2, Self.graphics, .driver(buffer), SlotFlags())
        } catch { return nil }
    }

    private func add(
        _ id: UInt32, _ place: (frame: UInt64, pages: UInt64, user: UInt64), _ backing: Backing, _ flags: SlotFlags
    ) throws(Errno) {
        let user = UserAddress(place.user << pageShift)
        try space.map(at: user, length: place.pages << pageShift, protection: .readWrite, backing: backing)
        try vm.setMemoryRegion(
            MemoryRegion(
                slot: id, flags: flags, guestAddress: GuestFrame(place.frame).address, size: place.pages << pageShift,
                userAddress: user))
    }

    func end() {
        vm.destroy()
        space.exit()
    }

    /// Where an entry points: mostly a table.
    static func target(_ random: inout SplitMix) -> UInt64 {
        let bits = random.next()
        switch bits % 64 {
        case 0..<40: return ((bits >> 8) % tables) << pageShift
        case 40..<46: return (readOnly.frame + (bits >> 8) % readOnly.pages) << pageShift
        case 46..<52: return (graphics.frame + (bits >> 8) % graphics.pages) << pageShift
        case 52..<60: return (tables + (bits >> 8) % (ram.pages - tables)) << pageShift
        case 60..<63: return (0x400 + (bits >> 8) % 512) << pageShift
        default: return bits & 0x000f_ffff_ffff_f000
        }
    }

    /// Every table anew: each is in one of the formats, or of any bytes.
    func renew(_ random: inout SplitMix, ept: Bool) throws(Errno) {
        for frame in 0..<Self.tables { try fill(Self.ram.user + frame, &random, ept) }
        for frame in 0..<Self.readOnly.pages { try fill(Self.readOnly.user + frame, &random, ept) }
        for frame in 0..<Self.graphics.pages { try fill(Self.graphics.user + frame, &random, ept) }
    }

    private func fill(_ page: UInt64, _ random: inout SplitMix, _ ept: Bool) throws(Errno) {
        let style = random.next() % 16
        let first = UserAddress(page << pageShift)
        for index in 0..<512 as Range<UInt64> {
            let value: UInt64
            switch style {
            case 0: value = random.next()
            case 1...3 where !ept:
                value = Self.narrow(&random) | Self.narrow(&random) << 32
            default: value = Self.entry(&random, ept: ept)
            }
            try space.store(first + index * 8, value)
        }
    }

    private static func narrow(_ random: inout SplitMix) -> UInt64 {
        let bits = random.next()
        return RandomEntry.narrow(bits, target(&random))
    }

    static func entry(_ random: inout SplitMix, ept: Bool) -> UInt64 {
        let bits = random.next()
        if ept { return RandomEntry.ept(bits, target(&random)) }
        return RandomEntry.wide(bits, target(&random)) ?? random.next()
    }

    /// What maps a frame that the slot's memory does not have there: an escape. Nil: nothing does.
    func escape() -> String? {
        var found: String?
        vm.mmu.forEachLeaf { leaf in
            for i in 0..<leaf.level.frames {
                let guest = leaf.guestFrame.advanced(by: Int(i))
                let slot = vm.slot(containing: guest)
                let own = slot.flatMap { space.translate($0.userAddress(of: guest)) }
                if own?.frame != leaf.frame.advanced(by: Int(i)) {
                    found = "guest frame \(guest.number) is mapped to host frame \(leaf.frame.number + i)"
                } else if leaf.writable, slot?.flags.readOnly == true {
                    found = "guest frame \(guest.number) of a read-only slot is writable"
                }
            }
        }
        return found
    }
}
