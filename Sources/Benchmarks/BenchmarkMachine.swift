// Benchmarks: the work of `faultline bench`. It reports what ran, beside the least that the machine could have done.

import Frames
import GuestMemory
import HostMemory
import Machine
import Paging
import SeededRandom

/// A VM with one slot of anonymous memory, whose guest frames are shuffled over the arena: neighbours in the guest are
/// strangers in physical memory, as on a host that has run for a while, so that touching page frames misses every cache.
final class BenchmarkMachine {
    let vm: VirtualMachine
    let mmu: TDPMMU
    let pages: Int
    private let process: AddressSpace
    let cpus: [VirtualCPU]
    private let arena: MappedArena
    /// On huge pages, as Linux keeps them: the policies that touch page frames pay for cache misses, not for this
    /// process's page tables.
    private let pageFrames: MappedArena
    private static let user = UserAddress(0x7f00_0000_0000)

    /// Nil: this machine has no room for the arena.
    /// - Parameters:
    ///   - blockOrder: shuffle single pages (0) or blocks of 2 MiB (9).
    ///   - hugePages: keep tables on huge pages of this machine, as Linux's direct map does.
    init?(
        pages: Int, policy: PolicyKind, blockOrder: Int, seed: UInt64, virtualCPUs: Int = 1, hugePages: Bool = false
    ) {
        // A sixteenth more for tables and the allocator's odd blocks.
        let frames = pages + pages / 16 + 8192
        guard let arena = MappedArena(size: frames * Int(pageSize), hugePages: hugePages),
            let pageFrames = MappedArena(size: frames * 64, hugePages: true)
        else { return nil }
        self.arena = arena
        self.pageFrames = pageFrames
        self.pages = pages
        let memory = PhysicalMemory(
            arena: arena.base, ramFrames: frames, arenaIsZero: true,
            pageFrameStorage: pageFrames.base)
        let host = Host(memory: memory, transparentHugePages: blockOrder > 0)
        process = AddressSpace(host: host)
        mmu = TDPMMU()
        vm = VirtualMachine(addressSpace: process, mmu: mmu, policy: policy)
        cpus = (0..<virtualCPUs).map { [vm] in VirtualCPU(number: $0, vm: vm) }
        for cpu in cpus { vm.add(cpu) }
        do throws(Errno) {
            try process.map(
                at: Self.user, length: UInt64(pages) * pageSize, protection: .readWrite, backing: .anonymous)
            try setLogging(false)
        } catch {
            return nil
        }
        populate(blockOrder, seed)
        for cpu in cpus {
            cpu.enterGuest()
            cpu.exitGuest()
        }
    }

    deinit {
        vm.destroy()
        process.exit()
    }

    func setLogging(_ on: Bool) throws(Errno) {
        try vm.setMemoryRegion(
            MemoryRegion(
                slot: 0, flags: SlotFlags(logDirtyPages: on), guestAddress: GuestAddress(0),
                size: UInt64(pages) * pageSize, userAddress: Self.user))
    }

    /// Makes the process's pages, in shuffled order; their bytes stay untouched.
    private func populate(_ blockOrder: Int, _ seed: UInt64) {
        var random = SplitMix(seed: seed)
        var order = [UInt32](0..<UInt32(pages >> blockOrder))
        order.shuffle(using: &random)
        for block in order {
            let address = Self.user + UInt64(block) << (pageShift + UInt64(blockOrder))
            var flags = LookupFlags()
            flags.write = true
            do throws(GetUserPagesError) {
                try process.getUserPageUnlocked(address, flags, holder: .getUserPages).releaseUnused()
            } catch {
                preconditionFailure("the arena is large enough for every page")
            }
        }
    }

    /// One guest write fault for each page, in the guest's order. Returns how many installed an entry.
    func faultAll() -> Int {
        var fixed = 0
        let side = vm.slotReaders.enter()
        for page in 0..<UInt64(pages) {
            let fault = GuestFault(
                address: GuestAddress(page << pageShift), access: .write, entryPresent: false)
            if mmu.handleFault(cpus[0], fault) == .fixed { fixed += 1 }
        }
        vm.slotReaders.exit(side)
        return fixed
    }

    /// Removes every entry as a notifier's range does, and flushes.
    func zapAll() {
        let guardian = vm.lockMMU()
        let flush = mmu.unmap(GuestFrame(0)..<GuestFrame(UInt64(pages)), in: 0, holding: guardian, mayBlock: false)
        if flush { vm.flushRemoteTLBs() }
        guardian.unlock()
    }

    /// Removes every entry and every table below the root.
    func endTables() { mmu.flushAll() }

    var slot: MemorySlot { vm.activeSlots[0] }
    var leaves4K: Int { vm.statistics.pages_4k.load(ordering: .relaxed) }
    var leaves2M: Int { vm.statistics.pages_2m.load(ordering: .relaxed) }

    /// Every page frame clean and unaccessed: marking them is what the policies differ in.
    func cleanPageFrames() { vm.memory.forgetAccessedAndDirty() }
}
