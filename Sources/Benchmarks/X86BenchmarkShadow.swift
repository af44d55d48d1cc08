import Frames
import GuestMemory
import HostMemory
import Machine
import Paging

/// A guest in long mode under the shadow MMU: its tables map its memory one to one, page by page.
final class ShadowBenchmarkMachine {
    private let vm: VirtualMachine
    private let mmu = ShadowMMU()
    private let cpu: PagedCPU
    private let process: AddressSpace
    private let arena: MappedArena
    private static let user = UserAddress(0x7f00_0000_0000)
    /// The guest's tables stand in its first frames.
    private static let tables = 16
    private static let pages = 2048
    /// One page of each block of 8: a fault maps its block's other pages ahead of use.
    static let faults = (pages - tables) / 8

    init() throws(BenchmarkError) {
        guard let arena = MappedArena(size: 16384 << 12, hugePages: true) else { throw .noMemory("64 MiB") }
        self.arena = arena
        let memory = PhysicalMemory(arena: arena.base, ramFrames: 16384, arenaIsZero: true)
        process = AddressSpace(host: Host(memory: memory, transparentHugePages: false))
        vm = VirtualMachine(addressSpace: process, mmu: mmu)
        cpu = PagedCPU(number: 0, vm: vm, mmu: mmu)
        vm.add(cpu)
        do throws(Errno) { try setUp() } catch { throw .wrongResult("a guest under the shadow MMU: \(error)") }
        mmu.load(.longMode(root: GuestAddress(0x1000)), on: cpu)
        cpu.enterGuest()
        cpu.exitGuest()
    }

    deinit {
        vm.destroy()
        process.exit()
    }

    private func setUp() throws(Errno) {
        let size = UInt64(Self.pages) << 12
        try process.map(at: Self.user, length: size, protection: .readWrite, backing: .anonymous)
        try vm.setMemoryRegion(
            MemoryRegion(slot: 0, guestAddress: GuestAddress(0), size: size, userAddress: Self.user))
        try write(1, 0, 0x2007)
        try write(2, 0, 0x3007)
        for table in 0..<Self.pages / 512 { try write(3, table, UInt64(4 + table) << 12 | 7) }
        for page in 0..<Self.pages {
            try write(4 + page / 512, page % 512, UInt64(page) << 12 | 0x67)
            if page >= Self.tables { try process.store(Self.user + UInt64(page) << 12, 0) }
        }
    }

    private func write(_ frame: Int, _ index: Int, _ entry: UInt64) throws(Errno) {
        try process.store(Self.user + UInt64(frame) << 12 + UInt64(index) * 8, entry)
    }

    /// A write fault in each block of 8 pages but those of the tables. Returns how many installed an entry.
    func faultAll() -> Int {
        var fixed = 0
        for page in stride(from: UInt64(Self.tables), to: UInt64(Self.pages), by: 8) {
            let fault = GuestFault(address: GuestAddress(page << pageShift), access: .write, entryPresent: false)
            let section = vm.slotReaders.enter()
            if case .fixed = mmu.handleFault(cpu, fault) { fixed += 1 }
            vm.slotReaders.exit(section)
        }
        return fixed
    }

    /// Removes the entries of all but the guest's tables, as a notifier's range does; the shadow pages stay.
    func zapAll() {
        let guardian = vm.lockMMU()
        let range = GuestFrame(UInt64(Self.tables))..<GuestFrame(UInt64(Self.pages))
        if mmu.unmap(range, in: 0, holding: guardian, mayBlock: false) { vm.flushRemoteTLBs() }
        guardian.unlock()
    }
}
