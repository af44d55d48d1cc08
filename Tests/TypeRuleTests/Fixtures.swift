import Frames
import Synchronization
import Testing

@testable import Audit
@testable import GuestMemory
@testable import HostMemory
@testable import Synchrony

/// A few frames of memory with a journal, and the one reference of each page handed out.
final class SmallMemory {
    let journal = Journal()
    let memory: PhysicalMemory
    private let arena: UnsafeMutableRawPointer
    private static let frames = 64

    init() {
        arena = .allocate(byteCount: Self.frames * Int(pageSize), alignment: Int(pageSize))
        arena.initializeMemory(as: UInt8.self, repeating: 0, count: Self.frames * Int(pageSize))
        memory = PhysicalMemory(arena: arena, ramFrames: Self.frames, arenaIsZero: true, journal: journal)
    }

    deinit { arena.deallocate() }

    /// A page that somebody else owns, and on top of that one reference for `holder`.
    func reference(holder: Holder) -> PageReference {
        let page = ownedPage()
        #expect(memory.tryGet(page))
        return PageReference(adopting: page, of: memory, holder: holder)
    }

    /// The same with a pin.
    func pin(holder: Holder) -> PagePin {
        let page = ownedPage()
        #expect(memory.tryPin(page))
        return PagePin(adopting: page, of: memory, holder: holder)
    }

    private func ownedPage() -> UnsafeMutablePointer<PageFrame> {
        guard let frame = memory.allocatePages(order: 0) else { preconditionFailure("64 frames are enough") }
        return memory.page(frame)
    }

    func count(_ frame: HostFrame) -> Int? { memory.inspect(frame)?.referenceCount }
    func events(_ kind: Event.Kind) -> [Event] { journal.events.filter { $0.kind == kind } }
}

/// The layout that the entry tests use: a frame number in bits 12..<52, and bit 1 lets the guest write.
let testField = FrameField(mask: 0x000f_ffff_ffff_f000, shift: pageShift, write: 2)

/// Runs `body` with an entry that holds `value`.
func withEntry<R>(_ value: UInt64 = 0, _ body: (StageTwoEntry) -> R) -> R {
    let raw = UnsafeMutableRawPointer.allocate(byteCount: 8, alignment: 8)
    defer { raw.deallocate() }
    raw.storeBytes(of: value, as: UInt64.self)
    return body(StageTwoEntry(AtomicWord(at: raw), testField))
}

/// A VM with sixteen pages of anonymous memory at guest frame 16, and tables that map nothing: the tests make entries.
final class SmallVM {
    // In this order they go: the address space still clears its tables, which lie in the memory.
    let vm: VirtualMachine
    let small: SmallMemory
    private static let user = UserAddress(0x7000_0000_0000)

    init(policy: PolicyKind = .precise) throws {
        small = SmallMemory()
        let space = AddressSpace(host: Host(memory: small.memory, transparentHugePages: false))
        vm = VirtualMachine(addressSpace: space, mmu: SecondaryMMU(), policy: policy)
        try space.map(
            at: Self.user, length: 16 * pageSize, protection: Protection(read: true, write: true), backing: .anonymous)
        try vm.setMemoryRegion(
            MemoryRegion(
                slot: 0, guestAddress: GuestFrame(16).address, size: 16 * pageSize, userAddress: Self.user))
    }

    deinit { vm.destroy() }

    /// Faults a page in for write, and hands what was found to `body`.
    func faultIn<R>(_ frame: GuestFrame, _ body: (consuming FaultedFrame) -> R) -> R? {
        vm.withSlots {
            let slot = vm.slot(containing: frame)
            switch vm.faultIn(frame, slot: slot, write: true, snapshot: vm.snapshot()) {
            case .failed: return nil
            case .frame(let faulted): return body(faulted)
            }
        }
    }

    /// The host takes the page of `frame` away.
    func discard(_ frame: GuestFrame) throws {
        let address = Self.user + (frame.number - 16) * pageSize
        try vm.addressSpace.advise(address..<(address + pageSize), .dontNeed)
    }
}
