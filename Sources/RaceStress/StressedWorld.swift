import Audit
import Foundation
import Frames
import GuestMemory
import HostMemory
import Machine
import Paging
import SeededRandom
import Synchronization
import Synchrony

/// A VM with two vCPUs, and everybody who gets in their way.
final class StressedWorld: Sendable {
    enum Kind { case tdp, shadow }

    private static let pages = 1024
    private static let user = UserAddress(0x7f00_0000_0000)

    private let kind: Kind
    private let arena: MappedArena
    private let host: HostMemory.Host
    private let process: AddressSpace
    private let vm: VirtualMachine
    private let cpus: [VirtualCPU]
    private let tables: StageTwoTables?
    private let shadow: ShadowMMU?
    private let stops = Atomic<Bool>(false)
    private let threads = DispatchGroup()
    private let accesses = Atomic<Int>(0)
    private let disturbances = Atomic<Int>(0)
    private let violations = Atomic<Int>(0)
    private let plants: Bool
    /// The mistake: raised by both vCPUs. Unsafe: it is there to race.
    private nonisolated(unsafe) var planted = 0

    init(_ kind: Kind, plants: Bool) {
        self.kind = kind
        self.plants = plants
        let frames = 16384
        guard let arena = MappedArena(size: frames << 12) else { fatalError("no room for the arena") }
        self.arena = arena
        // No journal listens: its lock would order what races.
        let memory = PhysicalMemory(arena: arena.base, ramFrames: frames, arenaIsZero: true)
        host = HostMemory.Host(memory: memory, transparentHugePages: true, swap: SwapDevice(slots: 4096))
        process = AddressSpace(host: host)
        switch kind {
        case .tdp:
            let mmu = TDPMMU()
            (tables, shadow) = (.tdp(mmu), nil)
            vm = VirtualMachine(addressSpace: process, mmu: mmu)
            let (machine, found) = (vm, StageTwoTables.tdp(mmu))
            cpus = (0..<2).map { number in
                let cpu = GuestCPU(number: number, vm: machine, tables: found)
                cpu.patience = 1_000_000
                return cpu
            }
        case .shadow:
            let mmu = ShadowMMU()
            (tables, shadow) = (nil, mmu)
            vm = VirtualMachine(addressSpace: process, mmu: mmu)
            let machine = vm
            cpus = (0..<2).map { number in
                let cpu = PagedCPU(number: number, vm: machine, mmu: mmu)
                cpu.patience = 1_000_000
                return cpu
            }
        }
        for cpu in cpus { vm.add(cpu) }
        must {
            try process.map(
                at: Self.user, length: UInt64(Self.pages) * pageSize, protection: .readWrite, backing: .anonymous)
            try setSlot(logs: false)
            if let shadow { try mapIdentity(shadow) }
        }
    }

    private func must(_ body: () throws -> Void) {
        do { try body() } catch { fatalError("the world can't be made: \(error)") }
    }

    private func address(_ page: Int) -> UserAddress { Self.user + UInt64(page) << pageShift }
    private func range(_ page: Int, _ count: Int) -> Range<UserAddress> {
        address(page)..<address(min(page + count, Self.pages))
    }

    private func setSlot(logs: Bool) throws(Errno) {
        try vm.setMemoryRegion(
            MemoryRegion(
                slot: 0, flags: SlotFlags(logDirtyPages: logs), guestAddress: GuestAddress(0),
                size: UInt64(Self.pages) * pageSize, userAddress: Self.user))
    }

    /// A second slot, above the first, that comes and goes.
    private func setOtherSlot(pages: Int) throws(Errno) {
        try vm.setMemoryRegion(
            MemoryRegion(
                slot: 1, guestAddress: GuestFrame(UInt64(Self.pages)).address, size: UInt64(pages) * pageSize,
                userAddress: Self.user))
    }

    /// Guest tables in frames 1 to 5: 4 MiB, page by page.
    private func mapIdentity(_ mmu: ShadowMMU) throws {
        func write(_ frame: Int, _ index: Int, _ entry: UInt64) throws {
            try process.store(address(frame) + UInt64(index) * 8, entry)
        }
        try write(1, 0, 0x2007)
        try write(2, 0, 0x3007)
        try write(3, 0, 0x4007)
        try write(3, 1, 0x5007)
        for page in 0..<Self.pages { try write(4 + page / 512, page % 512, UInt64(page) << 12 | 0x67) }
        for case let cpu as PagedCPU in cpus { mmu.load(.longMode(root: GuestAddress(0x1000)), on: cpu) }
    }

    // MARK: Who runs

    func run(seconds: Double, seed: UInt64) {
        for (number, cpu) in cpus.enumerated() {
            spawn { self.runGuest(cpu, SplitMix(seed: seed &+ UInt64(number))) }
        }
        let others: [@Sendable (inout SplitMix) -> Void] = [
            { self.changeMappings(&$0) }, { self.ageAndMove(&$0) }, { self.harvestLog(&$0) }, { self.changeSlots(&$0) },
        ]
        for (number, other) in others.enumerated() {
            spawn {
                var random = SplitMix(seed: seed &+ 100 &+ UInt64(number))
                while !self.stops.load(ordering: .relaxed) {
                    other(&random)
                    self.disturbances.add(1, ordering: .relaxed)
                    usleep(UInt32.random(in: 0..<1000, using: &random))
                }
            }
        }
        Thread.sleep(forTimeInterval: seconds)
        stops.store(true, ordering: .relaxed)
        threads.wait()
    }

    private func spawn(_ body: @escaping @Sendable () -> Void) {
        threads.enter()
        Thread.detachNewThread {
            LockViolations.clear()
            body()
            let seen = LockViolations.ofCurrentTask()
            self.violations.add(Int(seen.order + seen.sleeping), ordering: .relaxed)
            self.threads.leave()
        }
    }

    private func runGuest(_ cpu: VirtualCPU, _ seeded: SplitMix) {
        var random = seeded
        while !stops.load(ordering: .relaxed) {
            let page = Int.random(in: 8..<Self.pages + 16, using: &random)
            let place = UInt64(page) << pageShift + UInt64.random(in: 0..<512, using: &random) * 8
            switch cpu {
            case let cpu as GuestCPU:
                let kind = AccessKind.allCases[Int.random(in: 0..<3, using: &random)]
                _ = cpu.access(kind, GuestAddress(place), value: place)
            case let cpu as PagedCPU: accessPaged(cpu, page % Self.pages, place, &random)
            default: fatalError("a vCPU of another kind")
            }
            accesses.add(1, ordering: .relaxed)
            if plants { planted += 1 }
        }
    }

    private func accessPaged(_ cpu: PagedCPU, _ page: Int, _ place: UInt64, _ random: inout SplitMix) {
        switch Int.random(in: 0..<16, using: &random) {
        // The guest's own entry, with or without D.
        case 0:
            let entry = UInt64(page) << 12 | (Bool.random(using: &random) ? 0x67 : 0x27)
            _ = cpu.access(.store(entry), at: UInt64(4 + page / 512) << 12 + UInt64(page % 512) * 8)
            cpu.flush(UInt64(page) << 12)
        case 1: cpu.flushAll()
        case 2..<6: _ = cpu.access(.load, at: place)
        case 6: _ = cpu.access(.fetch, at: place)
        case 7: _ = cpu.access(.lockedAdd(1), at: place)
        default: _ = cpu.access(.store(place), at: place)
        }
    }

    // MARK: Who gets in their way. Pages below 8 are the guest's tables, and stay.

    private func changeMappings(_ random: inout SplitMix) {
        let page = Int.random(in: 8..<Self.pages, using: &random)
        let range = range(page, Int.random(in: 1..<64, using: &random))
        do {
            switch Int.random(in: 0..<4, using: &random) {
            case 0:
                try process.protect(range, .read)
                try process.protect(range, .readWrite)
            case 1: try process.fork().exit()
            default: try process.advise(range, .dontNeed)
            }
        } catch { fatalError("a mapping can't be changed: \(error)") }
    }

    private func ageAndMove(_ random: inout SplitMix) {
        let page = Int.random(in: 8..<Self.pages, using: &random)
        let range = range(page, 64)
        switch Int.random(in: 0..<5, using: &random) {
        case 0: _ = process.clearFlushYoung(range)
        case 1: _ = process.clearYoung(range)
        case 2: _ = process.testYoung(range.lowerBound)
        case 3: _ = host.migrate(process, range)
        default: _ = host.reclaim(pages: 16)
        }
    }

    private func harvestLog(_ random: inout SplitMix) {
        do {
            let found = try vm.getDirtyLog(slot: 0)
            try vm.clearDirtyLog(slot: 0, firstPage: 0, pages: UInt64(Self.pages), bitmap: found)
        } catch {
            // The slot is not logged right now.
            guard error == .ENOENT else { fatalError("the log can't be read: \(error)") }
        }
    }

    private func changeSlots(_ random: inout SplitMix) {
        do {
            try setOtherSlot(pages: 16)
            try setSlot(logs: Bool.random(using: &random))
            try setOtherSlot(pages: 0)
        } catch { fatalError("a slot can't be changed: \(error)") }
    }

    // MARK: The end

    var summary: String {
        "\(accesses.load(ordering: .relaxed)) accesses, \(disturbances.load(ordering: .relaxed)) disturbances"
    }

    /// What is wrong once everybody has stopped.
    func end() -> [String] {
        var failures: [String] = []
        if violations.load(ordering: .relaxed) != 0 { failures.append("locks out of order, or a sleep under one") }
        if accesses.load(ordering: .relaxed) == 0 { failures.append("the guest did nothing") }
        let broken =
            switch tables {
            case .tdp(let mmu): mmu.checkTables()
            default: shadow?.checkTables() ?? []
            }
        vm.destroy()
        process.exit()
        for finding in broken { failures.append("\(finding)") }
        return failures
    }
}
