import CBenchmarkLimits
import Frames
import GuestMemory
import HostMemory
import Machine
import Paging
import SeededRandom

/// What is measured of slots.
public enum SlotOperation: String, Sendable, CaseIterable, Codable {
    case hinted = "frame to user address, slot of the last lookup"
    case ofCPU = "the same by a vCPU"
    case search = "frame to user address, any slot"
    case notified = "the slot of a user page, for a notifier"
    case change = "create a slot and delete it"

    /// What the limit row does for each.
    public var limit: String {
        switch self {
        case .hinted, .ofCPU: "the hint loaded, its range compared"
        case .search, .notified: "a binary search in a flat array"
        case .change: "a pointer into 4 runs of 64, and out again"
        }
    }

    /// Nanoseconds to reach.
    public var goal: Double? {
        switch self {
        case .hinted, .ofCPU: 10
        case .change: 20_000
        case .search, .notified: nil
        }
    }
}

/// One line of the table: medians over the rounds, in nanoseconds for each operation.
public struct SlotRow: Sendable, Codable {
    public var operation: SlotOperation
    public var nanoseconds: Double
    public var limit: Double
    public var ratioToLimit: Double
}

public struct SlotReport: Sendable, Codable {
    public var slots: Int
    public var rounds: Int
    public var seed: UInt64
    public var rows: [SlotRow]
}

/// Lookups and changes in a VM with very many slots, under the TDP MMU.
public struct SlotBenchmark: Sendable {
    public var slots: Int
    public var lookups: Int
    public var changes: Int
    public var rounds: Int
    public var seed: UInt64

    public init(slots: Int = 32_000, lookups: Int = 1 << 20, changes: Int = 2000, rounds: Int, seed: UInt64) {
        precondition(slots > 0 && slots < VirtualMachine.userSlots)
        self.slots = slots
        self.lookups = lookups
        self.changes = changes
        self.rounds = rounds
        self.seed = seed
    }

    /// Slots of two pages, a page apart.
    private static let pages = 2
    private static let step: UInt64 = 3
    private static let user = UserAddress(0x2000_0000_0000)

    private struct Samples {
        var own: [Double] = []
        var limits: [Double] = []
    }

    public func run(progress: (String) -> Void) throws(BenchmarkError) -> SlotReport {
        guard let arena = MappedArena(size: 64 << 12) else { throw .noMemory("256 KiB of address space") }
        let memory = PhysicalMemory(arena: arena.base, ramFrames: 64, arenaIsZero: true)
        let process = AddressSpace(host: Host(memory: memory, transparentHugePages: false))
        let vm = VirtualMachine(addressSpace: process, mmu: TDPMMU())
        let cpu = VirtualCPU(number: 0, vm: vm)
        vm.add(cpu)
        defer {
            vm.destroy()
            process.exit()
        }
        var random = SplitMix(seed: seed)
        progress("\(slots) slots being made")
        for id in (0..<slots).shuffled(using: &random) { try set(vm, id, id) }
        var samples: [SlotOperation: Samples] = [:]
        for round in 0..<rounds + 1 {
            for operation in SlotOperation.allCases {
                progress("\(operation.rawValue)")
                let own = try measure(operation, vm, cpu, &random)
                let limit = try measureLimit(operation, &random)
                guard round > 0 else { continue }
                samples[operation, default: Samples()].own.append(own)
                samples[operation, default: Samples()].limits.append(limit)
            }
        }
        let rows = SlotOperation.allCases.map { operation in
            let found = samples[operation, default: Samples()]
            let (own, limit) = (middle(of: found.own), middle(of: found.limits))
            return SlotRow(operation: operation, nanoseconds: own, limit: limit, ratioToLimit: own / limit)
        }
        return SlotReport(slots: slots, rounds: rounds, seed: seed, rows: rows)
    }

    private func set(_ vm: VirtualMachine, _ id: Int, _ place: Int, size: Int = pages) throws(BenchmarkError) {
        let region = MemoryRegion(
            slot: UInt32(id), guestAddress: GuestFrame(UInt64(place) * Self.step).address,
            size: UInt64(size) * pageSize, userAddress: Self.user + UInt64(place) * Self.step * pageSize)
        do throws(Errno) { try vm.setMemoryRegion(region) } catch {
            throw .wrongResult("slot \(id): \(error)")
        }
    }

    private func frames(_ count: Int, in slots: Range<Int>, _ random: inout SplitMix) -> [UInt64] {
        (0..<count).map { _ in
            UInt64(Int.random(in: slots, using: &random)) * Self.step + UInt64.random(in: 0..<2, using: &random)
        }
    }

    private func measure(
        _ operation: SlotOperation, _ vm: VirtualMachine, _ cpu: VirtualCPU, _ random: inout SplitMix
    ) throws(BenchmarkError) -> Double {
        switch operation {
        case .hinted, .ofCPU, .search:
            let one = Int.random(in: 0..<slots, using: &random)
            let frames = frames(lookups, in: operation == .search ? 0..<slots : one..<one + 1, &random)
            var sum: UInt64 = 0
            let elapsed = vm.withSlots {
                time {
                    if operation == .ofCPU {
                        for frame in frames { sum &+= cpu.userAddress(of: GuestFrame(frame))?.value ?? 0 }
                    } else {
                        for frame in frames { sum &+= vm.userAddress(of: GuestFrame(frame))?.value ?? 0 }
                    }
                }
            }.nanoseconds
            let wanted = frames.reduce(UInt64(0)) { $0 &+ Self.user.value &+ $1 << pageShift }
            guard sum == wanted else { throw .wrongResult("a lookup gave another address") }
            return elapsed / Double(lookups)
        case .notified:
            let pages = frames(lookups / 16, in: 0..<slots, &random)
            var found = 0
            let elapsed = vm.withSlots {
                time {
                    for page in pages {
                        let address = Self.user + page << pageShift
                        vm.forEachSlot(intersecting: address..<address + pageSize) { _, _ in found += 1 }
                    }
                }
            }.nanoseconds
            guard found == pages.count else { throw .wrongResult("the notifier found \(found) slots") }
            return elapsed / Double(pages.count)
        case .change: return try measureChanges(vm, &random)
        }
    }

    /// The slot goes into the gap behind another.
    private func measureChanges(
        _ vm: VirtualMachine, _ random: inout SplitMix
    ) throws(BenchmarkError) -> Double {
        let places = (0..<changes).map { _ in UInt64(Int.random(in: 0..<slots, using: &random)) * Self.step + 2 }
        var failed = 0
        let elapsed = time {
            for place in places {
                var region = MemoryRegion(
                    slot: UInt32(slots), guestAddress: GuestFrame(place).address, size: pageSize,
                    userAddress: Self.user + place << pageShift)
                do throws(Errno) {
                    try vm.setMemoryRegion(region)
                    region.size = 0
                    try vm.setMemoryRegion(region)
                } catch { failed += 1 }
            }
        }.nanoseconds
        guard failed == 0, vm.slotSetsAgree() else { throw .wrongResult("\(failed) changes of slots failed") }
        return elapsed / Double(changes)
    }

    private func measureLimit(
        _ operation: SlotOperation, _ random: inout SplitMix
    ) throws(BenchmarkError) -> Double {
        var sum: UInt64 = 0
        let count = operation == .change ? changes : lookups
        let frames = frames(count, in: 0..<slots, &random)
        let bases = (0..<slots).map { UInt64($0) * Self.step }
        let elapsed = time {
            switch operation {
            case .hinted, .ofCPU: sum = limit_hinted_lookups(frames, frames.count)
            case .search, .notified: sum = limit_searches(bases, bases.count, frames, frames.count)
            case .change: sum = limit_run_changes(changes)
            }
        }.nanoseconds
        guard sum > 0 else { throw .wrongResult("a limit found nothing") }
        return elapsed / Double(count)
    }
}
