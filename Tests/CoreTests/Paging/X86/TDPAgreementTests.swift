import Audit
import Foundation
import Frames
import HostMemory
import Paging
import Synchronization
import Testing

@testable import GuestMemory

/// I-7, C1: whatever happened, the tables map what the process's own tables map, and nobody holds a page. Random runs,
/// each repeatable from its seed.
@Suite struct I7_TDPAgreement {
    private static let count = 1100

    private func expectAgreement(_ machine: TDPMachine, _ context: String) {
        for leaf in machine.leaves() {
            for i: UInt64 in [0, leaf.level.frames / 2, leaf.level.frames - 1] {
                let host = machine.space.translate(at(Int(leaf.guestFrame.number + i)))
                #expect(
                    host?.frame.number == leaf.frame.number + i, "\(context): frame of \(leaf.guestFrame.number + i)")
                if leaf.writable { #expect(host?.writable == true, "\(context): writable") }
            }
        }
        #expect(machine.mmu.checkTables() == [], "\(context)")
        #expect(machine.journal.holdings.isEmpty, "\(context)")
    }

    @Test(arguments: [UInt64(1), 2, 3, 4, 5, 6, 7, 8], [true, false])
    func `tables agree with the process after any sequence of events`(seed: UInt64, accessDirty: Bool) throws {
        var random = TestRandom(seed: seed &* 0x9e37_79b9_7f4a_7c15)
        let policy = PolicyKind.allCases[Int(seed % 3)]
        let machine = TDPMachine(
            policy: policy, mmu: TDPMMU(accessDirty: accessDirty, zapsOnlySlot: seed % 2 == 0), ramFrames: 8192,
            thp: seed % 4 < 2, cpus: 2)
        try machine.slot(count: Self.count)
        var content = [UInt64](repeating: 0, count: Self.count)
        var written = Set<Int>()
        var isLogging = false
        for step in 0..<150 {
            let n = Int.random(in: 0..<Self.count, using: &random)
            let end = n + Int.random(in: 1...min(600, Self.count - n), using: &random)
            let cpu = machine.cpus[step % 2]
            switch Int.random(in: 0..<12, using: &random) {
            case 0:
                try machine.space.advise(at(n)..<at(end), .dontNeed)
                for i in n..<end { content[i] = 0 }
            case 1:
                let child = try machine.space.fork()
                #expect(cpu.write(UInt64(n), 9) == .done(.stored))
                content[n] = 9
                written.insert(n)
                child.exit()
            case 2:
                isLogging.toggle()
                written = []
                try machine.logging(isLogging, count: Self.count)
            case 3 where isLogging:
                let log = try machine.dirtyLog()
                for i in written { #expect(log[i / 64] >> UInt64(i % 64) & 1 == 1, "seed \(seed), step \(step), X43") }
                written = []
            case 4: _ = machine.space.clearYoung(at(n)..<at(end))
            case 5 where step % 5 == 0:
                try machine.set(count: 0, SlotFlags())
                try machine.set(count: Self.count, SlotFlags(logDirtyPages: isLogging))
                written = []
            case 6, 7: #expect(cpu.read(UInt64(n)) == .done(.value(content[n])), "seed \(seed), step \(step)")
            default:
                for i in n..<min(end, n + 8) {
                    #expect(cpu.write(UInt64(i), UInt64(step)) == .done(.stored))
                    content[i] = UInt64(step)
                    written.insert(i)
                }
            }
            expectAgreement(machine, "seed \(seed), step \(step)")
        }
        for i in 0..<Self.count where content[i] != 0 { #expect(try machine.space.load(at(i)) == content[i]) }
    }

    /// Real threads: vCPUs that write while the host takes pages away, ages, logs and deletes the slot.
    @Test func `vCPUs and host at once`() throws {
        let machine = TDPMachine(ramFrames: 8192, thp: true, cpus: 2)
        try machine.slot(count: Self.count)
        let stop = StopFlag()
        let done = DispatchGroup()
        for cpu in machine.cpus {
            done.enter()
            let thread = Thread {
                var random = TestRandom(seed: UInt64(cpu.number) + 77)
                var wrong = 0
                while !stop.isSet {
                    let frame = UInt64.random(in: 0..<UInt64(Self.count), using: &random)
                    let result = cpu.write(frame, frame)
                    if result != .done(.stored), result != .ended(.emulate), result != .livelock { wrong += 1 }
                }
                stop.add(wrong)
                done.leave()
            }
            thread.start()
        }
        var random = TestRandom(seed: 5)
        for step in 0..<60 {
            let n = Int.random(in: 0..<1024, using: &random)
            switch step % 6 {
            case 0: try machine.space.advise(at(n)..<at(min(Self.count, n + 64)), .dontNeed)
            case 1: _ = machine.space.clearYoung(at(n)..<at(Self.count))
            case 2: try machine.logging(true, count: Self.count)
            case 3: _ = try machine.dirtyLog()
            case 4: try machine.logging(false, count: Self.count)
            default:
                if step % 12 == 5 {
                    try machine.set(count: 0, SlotFlags())
                    try machine.set(count: Self.count, SlotFlags())
                }
            }
        }
        stop.set()
        done.wait()
        #expect(stop.wrong == 0)
        #expect(machine.journal.findings.isEmpty)
        expectAgreement(machine, "after the threads")
    }
}

private final class StopFlag: Sendable {
    private let value = Atomic<Bool>(false)
    private let count = Atomic<Int>(0)
    var isSet: Bool { value.load(ordering: .acquiring) }
    func set() { value.store(true, ordering: .releasing) }
    func add(_ n: Int) { count.add(n, ordering: .relaxed) }
    var wrong: Int { count.load(ordering: .relaxed) }
}
