import Audit
import Frames
import Hardware
import HostMemory
import Synchrony
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// A guest hypervisor with guests of its own, on a host with EPT or NPT. Its memory begins at 0 and is one slot.
///
/// Its second-stage tables: the root is frame 1, below it frames 2, 3 and 4, which map the nested guest's first pages, `n`
/// to the hypervisor's frame 16 + `n`.
final class NestedGuest {
    let test: TestHost
    let space: AddressSpace
    let mmu: TDPMMU
    let vm: VirtualMachine
    let cpus: [NestedCPU]
    private let framesAtStart: Int
    private let pages: Int
    var expectedFindings = 0

    /// R W X, and a leaf's with write-back, A and D.
    static let table: UInt64 = 7
    static let page: UInt64 = 7 | 6 << 3 | 1 << 8 | 1 << 9
    /// EPTP: write-back, four levels, with A and D.
    static let pointer: UInt64 = 0x1000 | 6 | 3 << 3 | 1 << 6
    static let pointerWithoutAD: UInt64 = 0x1000 | 6 | 3 << 3
    static let firstFrame = 16

    init(
        pages: Int = 64, cpus count: Int = 1, ramFrames: Int = 1024, thp: Bool = false, log: Bool = false,
        rings: Bool = false,
        _ change: (inout TDPConfiguration) -> Void = { _ in }
    ) throws {
        var configuration = TDPConfiguration()
        configuration.nested = true
        configuration.cachesMMIO = false
        change(&configuration)
        mmu = TDPMMU(configuration)
        test = TestHost(ramFrames: ramFrames, thp: thp)
        framesAtStart = test.memory.freeFrames
        space = test.space()
        vm = VirtualMachine(addressSpace: space, mmu: mmu)
        if rings { try vm.enableDirtyRings(bytes: pageSize) }
        let (machine, tables) = (vm, mmu)
        cpus = (0..<count).map { NestedCPU(number: $0, vm: machine, mmu: tables) }
        self.pages = pages
        for cpu in cpus { try vm.create(cpu) }
        try space.map(at: at(0), length: UInt64(pages) * pageSize, protection: .readWrite, backing: .anonymous)
        try setSlot(log: log)
    }

    var cpu: NestedCPU { cpus[0] }
    var nested: ShadowMMU { mmu.nested! }

    func setSlot(log: Bool = false) throws {
        try vm.setMemoryRegion(
            MemoryRegion(
                slot: 0, flags: SlotFlags(logDirtyPages: log), guestAddress: GuestAddress(0),
                size: UInt64(pages) * pageSize, userAddress: at(0)))
    }

    /// The hypervisor's tables, as it would have made them, for `count` pages.
    func makeTables(count: Int = 32, leaf: UInt64 = NestedGuest.page, table: UInt64 = NestedGuest.table) throws {
        try write(1, 0, 0x2000 | table)
        try write(2, 0, 0x3000 | table)
        try write(3, 0, 0x4000 | table)
        for i in 0..<count { try write(4, i, Self.leaf(i, leaf)) }
    }

    static func leaf(_ page: Int, _ bits: UInt64 = NestedGuest.page) -> UInt64 {
        UInt64(firstFrame + page) << 12 | bits
    }

    func enter(_ pointer: UInt64 = NestedGuest.pointer, _ cpu: NestedCPU? = nil) throws {
        try mmu.enterNested(EPTTables(pointer: pointer), cpu ?? self.cpu)
    }

    /// Runs `body` as the hypervisor, on the vCPU that runs its guest.
    func asHypervisor<R>(
        _ pointer: UInt64 = NestedGuest.pointer, _ cpu: NestedCPU? = nil, _ body: (NestedCPU) throws -> R
    ) throws -> R {
        let cpu = cpu ?? self.cpu
        mmu.leaveNested(cpu)
        let result = try body(cpu)
        try enter(pointer, cpu)
        return result
    }

    /// Writes an entry of a table of the hypervisor's as the VMM would.
    func write(_ frame: Int, _ index: Int, _ entry: UInt64) throws {
        try space.store(at(0) + UInt64(frame) * pageSize + UInt64(index) * 8, entry)
    }
    func entry(_ frame: Int, _ index: Int) throws -> UInt64 {
        try space.load(at(0) + UInt64(frame) * pageSize + UInt64(index) * 8)
    }

    /// The address of an entry in the hypervisor's memory.
    static func place(_ frame: Int, _ index: Int) -> UInt64 { UInt64(frame) << 12 + UInt64(index) * 8 }

    /// Of the hypervisor's memory.
    func value(_ frame: Int) throws -> UInt64 { try space.load(at(frame)) }
    func frame(_ page: Int) -> HostFrame? { space.translate(at(page))?.frame }

    func leaf(_ address: UInt64, _ cpu: NestedCPU? = nil) -> UInt64? {
        nested.leaf(of: cpu ?? self.cpu, at: address)?.entry
    }
    /// Without its frame.
    func leafBits(_ address: UInt64) -> UInt64? { leaf(address).map { $0 & ~EntryBits.frameMask } }

    /// Of a frame of the hypervisor's: whether it is young; `clearing`, it is old then.
    func isYoung(_ frame: UInt64, clearing: Bool) -> Bool {
        let frames = GuestFrame(frame)..<GuestFrame(frame + 1)
        let guardian = vm.lockMMU()
        let young =
            clearing
            ? mmu.age(frames, in: 0, holding: guardian) : mmu.testAge(frames, in: 0, holding: guardian)
        guardian.unlock()
        return young
    }

    func shadowPage(_ frame: UInt64, level: UInt8 = 1) -> ShadowPage? {
        var found: ShadowPage?
        nested.index.forEachPage {
            if $0.frame.number == frame, $0.role.level == level, !$0.role.isInvalid { found = $0 }
        }
        return found
    }

    deinit {
        #expect(mmu.checkTables() == [])
        vm.destroy()
        test.journal.checkQuiescent()
        space.exit()
        let findings = test.journal.findings
        #expect(findings.count == expectedFindings, "findings: \(findings)")
        let logPages = mmu.configuration.modificationLogEntries == 0 ? 0 : cpus.count
        #expect(test.memory.freeFrames + logPages == framesAtStart, "frames leak")
    }
}
