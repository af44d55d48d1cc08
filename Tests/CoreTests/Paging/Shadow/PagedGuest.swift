import Audit
import Frames
import HostMemory
import Synchrony
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// A guest with page tables of its own, under the shadow MMU. Guest memory begins at 0 and is one slot.
///
/// Four levels: the root is frame 1, below it frames 2, 3 and 4, which map the first 2 MiB one to one; see `map`.
final class PagedGuest {
    let test: TestHost
    let space: AddressSpace
    let mmu: ShadowMMU
    let vm: VirtualMachine
    let cpus: [PagedCPU]
    private let framesAtStart: Int
    private let pages: Int
    var expectedFindings = 0

    static let table: UInt64 = 0x7  // P W U
    static let page: UInt64 = 0x67  // P W U A D

    init(
        pages: Int = 64, cpus count: Int = 1, ramFrames: Int = 1024, thp: Bool = false, log: Bool = false,
        longestChain: Int = 1000
    ) throws {
        mmu = ShadowMMU(longestChain: longestChain)
        test = TestHost(ramFrames: ramFrames, thp: thp)
        framesAtStart = test.memory.freeFrames
        space = test.space()
        vm = VirtualMachine(addressSpace: space, mmu: mmu)
        let (machine, tables) = (vm, mmu)
        cpus = (0..<count).map { PagedCPU(number: $0, vm: machine, mmu: tables) }
        self.pages = pages
        for cpu in cpus { vm.add(cpu) }
        try space.map(
            at: at(0), length: UInt64(pages) * pageSize, protection: .readWrite, backing: .anonymous)
        try setSlot(log: log)
    }

    func setSlot(log: Bool = false, readOnly: Bool = false) throws {
        try vm.setMemoryRegion(
            MemoryRegion(
                slot: 0, flags: SlotFlags(logDirtyPages: log, readOnly: readOnly), guestAddress: GuestAddress(0),
                size: UInt64(pages) * pageSize, userAddress: at(0)))
    }

    /// Tables for the first 2 MiB, of pages that are mapped one to one with `flags`; then the vCPUs load them.
    func identityMap(flags: UInt64 = PagedGuest.page) throws {
        try write(1, 0, 0x2000 | Self.table)
        try write(2, 0, 0x3000 | Self.table)
        try write(3, 0, 0x4000 | Self.table)
        for i in 0..<pages { try write(4, i, UInt64(i) << 12 | flags) }
        for cpu in cpus { mmu.load(.longMode(root: GuestAddress(0x1000)), on: cpu) }
    }

    /// Writes an entry of a guest table as the VMM would.
    func write(_ frame: Int, _ index: Int, _ entry: UInt64) throws {
        try space.store(at(0) + UInt64(frame) * pageSize + UInt64(index) * 8, entry)
    }

    func guestEntry(_ frame: Int, _ index: Int) throws -> UInt64 {
        try space.load(at(0) + UInt64(frame) * pageSize + UInt64(index) * 8)
    }

    func frame(_ page: Int) -> HostFrame? { space.translate(at(page))?.frame }

    /// The entries that were set since the last call: guest frame, its bits without the frame, its level.
    func entriesSet() -> [SetEntry] {
        let events = test.events(.entrySet).dropFirst(seen)
        seen += events.count
        return events.map {
            SetEntry(guest: $0.guest, bits: $0.value & ~EntryBits.frameMask, level: $0.level)
        }
    }
    private var seen = 0

    struct SetEntry: Equatable, CustomStringConvertible {
        var guest: UInt64
        var bits: UInt64
        var level: UInt8 = 1
        var description: String { "gfn \(String(guest, radix: 16)) \(String(bits, radix: 16)) l\(level)" }
    }

    func takeDown() {
        vm.destroy()
        test.journal.checkQuiescent()
        space.exit()
    }

    /// The shadow page of a guest table, or of the frames from `frame` on.
    func page(_ frame: UInt64, level: UInt8 = 1, quadrant: UInt8 = 0) -> ShadowPage? {
        var found: ShadowPage?
        mmu.index.forEachPage {
            guard $0.frame.number == frame, $0.role.level == level, $0.role.quadrant == quadrant else { return }
            if !$0.role.isInvalid { found = $0 }
        }
        return found
    }

    /// An entry of KVM's, to be damaged.
    func word(_ frame: UInt64, _ index: Int, level: UInt8 = 1) -> AtomicWord {
        vm.memory.entry(index, of: page(frame, level: level)!.table)
    }

    deinit {
        #expect(mmu.checkTables() == [])
        takeDown()
        let findings = test.journal.findings
        #expect(findings.count == expectedFindings, "findings: \(findings)")
        #expect(test.memory.freeFrames == framesAtStart, "frames leak")
    }
}
