import Frames
import Glibc
import GuestMemory
import Hardware
import HostMemory
import Paging
import Testing

@Suite struct RV3_GStageGeometry {
    @Test(arguments: GStageMMU.Mode.allCases)
    func `hgatp holds the mode, VMID 1 and a root aligned to 16 KiB`(mode: GStageMMU.Mode) throws {
        let guest = RISCVGuest(mode)
        let root = try #require(guest.mmu.root)
        #expect(root.number % 4 == 0)
        #expect(guest.mmu.hgatp >> 60 == (mode == .sv39x4 ? 8 : 9))
        #expect(guest.mmu.hgatp >> 44 & 0x3fff == 1)
        #expect(guest.mmu.hgatp & 0xfff_ffff_ffff == root.number)
        guest.end()
        #expect(guest.mmu.hgatp == 0, "no root, no mode")
    }

    @Test func `guest addresses have 41 and 50 bits`() {
        #expect(GStageMMU(mode: .sv39x4).guestAddressBits == 41)
        #expect(GStageMMU(mode: .sv48x4).guestAddressBits == 50)
    }

    /// The first and the last frame, and one in the last of the root's 2048 entries: each through its own root entry.
    @Test(arguments: GStageMMU.Mode.allCases)
    func `the root has 2048 entries`(mode: GStageMMU.Mode) throws {
        let guest = RISCVGuest(mode)
        try guest.space.mapPages(0, 1)
        try guest.space.advise(at(0)..<at(1), .noHugePage)
        let shift = UInt64(mode == .sv39x4 ? 18 : 27)
        let last = UInt64(1) << (shift + 11) - 1
        let frames: [UInt64] = [0, 1 << shift, 0x3ff << shift, 0x400 << shift, last]
        for (id, frame) in frames.enumerated() {
            try guest.vm.setMemoryRegion(
                MemoryRegion(
                    slot: UInt32(id), guestAddress: GuestFrame(frame).address, size: pageSize, userAddress: at(0)))
            #expect(guest.fault(frame: GuestFrame(frame), .write) == .fixed)
            let link = guest.memory.entry(Int(frame >> shift), of: try #require(guest.mmu.root)).load()
            #expect(link & 0x3ff == 1 && link >> 54 == 0, "a link has V alone")
        }
        #expect(guest.leaves.map(\.guestFrame.number) == frames)
        guest.expectSound()
        guest.end()
    }

    @Test func `a writable leaf is DF, a read-only one DB, and D is set from the start`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 1)
        try guest.anonymous(1, count: 1, readOnly: true, id: 1)
        #expect(guest.fault(0, .write) == .fixed)
        #expect(guest.fault(1, .read) == .fixed)
        for (n, low) in [(UInt64(0), UInt64(0xdf)), (1, 0xdb)] {
            let leaf = try #require(guest.leaf(n))
            #expect(leaf.entry == leaf.frame.number << 10 | low)
        }
        guest.expectSound()
    }
}

/// A host whose frames have the numbers of the specification's executed values, of which few are ever touched.
private final class HighHost {
    static let bytes = 0x8080_0000
    let arena: UnsafeMutableRawPointer
    let host: Host

    init() {
        arena = mmap(nil, Self.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        precondition(arena != MAP_FAILED, "no address space for the arena")
        let memory = PhysicalMemory(
            arena: arena, ramFrames: 256, deviceFrames: Self.bytes / 4096 - 256, arenaIsZero: true)
        host = Host(memory: memory, transparentHugePages: false)
    }
    deinit { munmap(arena, Self.bytes) }

    /// The next device frames begin at `frame`.
    func skip(to frame: UInt64) {
        let next = host.memory.allocateDeviceFrames(1)!.upperBound.number
        _ = host.memory.allocateDeviceFrames(Int(frame - next))
    }
}

/// Spec: arches section 11, RISC-V: executed on an emulator.
@Suite struct Arches_11_GStageKnownAnswers {
    @Test func `the leaves and their places are those of the executed tree`() throws {
        let high = HighHost()
        high.skip(to: 0x80400)
        let small = try #require(DeviceBAR(high.host, pages: 1, filling: .byFault))
        high.skip(to: 0x80600)
        let huge = try #require(DeviceBAR(high.host, pages: 512, filling: .byHugeFault))
        #expect(small.frames.lowerBound.number == 0x80400 && huge.frames.lowerBound.number == 0x80600)

        let space = AddressSpace(host: high.host)
        try space.mapPages(0, 1, .driver(small))
        try space.mapPages(512, 512, .driver(huge))
        let mmu = GStageMMU(mode: .sv39x4)
        let vm = VirtualMachine(addressSpace: space, mmu: mmu)
        let cpu = VirtualCPU(number: 0, vm: vm)
        vm.add(cpu)
        let slots: [(UInt64, Int, UInt64, Bool)] = [(0x80_4020_3000, 0, 1, false), (0x80_4040_0000, 512, 512, true)]
        for (id, (address, page, count, readOnly)) in slots.enumerated() {
            try vm.setMemoryRegion(
                MemoryRegion(
                    slot: UInt32(id), flags: SlotFlags(readOnly: readOnly), guestAddress: GuestAddress(address),
                    size: count * pageSize, userAddress: at(page)))
            let fault = GuestFault(address: GuestAddress(address + 0x18), access: .read, entryPresent: false)
            #expect(vm.withSlots { mmu.handleFault(cpu, fault) } == .fixed)
        }

        // root[0x201] -> L1[1] -> L0[3], and L1[2].
        let memory = high.host.memory
        let top = memory.entry(0x201, of: try #require(mmu.root)).load()
        let middle = memory.entry(1, of: HostFrame(top >> 10)).load()
        #expect(top & 0x3ff == 1 && middle & 0x3ff == 1)
        #expect(memory.entry(3, of: HostFrame(middle >> 10)).load() == 0x2010_00df)
        #expect(memory.entry(2, of: HostFrame(top >> 10)).load() == 0x2018_00db)
        let walker = GStageWalker(memory: memory, hgatp: mmu.hgatp, hardwareAD: false)
        #expect(walker.walk(GuestAddress(0x80_4020_3018), .write).translation?.frame == HostFrame(0x80400))
        #expect(walker.walk(GuestAddress(0x80_4040_0018), .read).translation?.frame == HostFrame(0x80600))
        #expect(walker.walk(GuestAddress(0x80_4040_0018), .write).violation?.reason == .rights)
        vm.destroy()
        space.exit()
    }
}
