import Audit
import Frames
import HostMemory
import Paging
import Synchrony
import Testing

@testable import GuestMemory
@testable import Machine

/// I-7, C1: whatever happened, the tables map what the process's own tables map, the guest reads what it wrote last, and
/// the log has every write. Random runs, each repeatable from its seed.
@Suite struct X86_2_5_DirectShadowAgreement {
    private static let count = 1100

    @Test(arguments: DirectGuest.Kind.allCases, [UInt64(1), 2, 3, 4, 5, 6])
    func `tables agree with the process after any sequence of events`(kind: DirectGuest.Kind, seed: UInt64) throws {
        var random = TestRandom(seed: seed &* 0x9e37_79b9_7f4a_7c15)
        let policy = PolicyName.allCases[Int(seed % 3)]
        let direct = DirectGuest(kind, ramFrames: 8192, thp: seed % 4 < 2, cpus: 2, policy: policy) {
            $0.zapsOnlySlot = seed % 2 == 0
            $0.nxHugePages = seed % 3 == 1
        }
        if seed == 5 { direct.mmu.pageLimit = 10 }
        let guest = direct.guest
        try guest.addMemory(0, Self.count)
        var content = [UInt64](repeating: 0, count: Self.count)
        var written = Set<Int>()
        var isLogging = false
        for step in 0..<150 {
            let n = Int.random(in: 0..<Self.count, using: &random)
            let end = n + Int.random(in: 1...min(600, Self.count - n), using: &random)
            let cpu = step % 2
            switch Int.random(in: 0..<13, using: &random) {
            case 0:
                try guest.space.advise(at(n)..<at(end), .dontNeed)
                for i in n..<end { content[i] = 0 }
            case 1:
                let child = try guest.space.fork()
                #expect(guest.store(n, 9, cpu: cpu) == .stored)
                content[n] = 9
                written.insert(n)
                child.exit()
            case 2:
                isLogging.toggle()
                written = []
                try guest.setSlot(pages: Self.count, log: isLogging)
            case 3 where isLogging:
                let log = try guest.vm.getDirtyLog(slot: 0)
                for i in written { #expect(log[i / 64] >> UInt64(i % 64) & 1 == 1, "seed \(seed), step \(step), X43") }
                written = []
            case 4: _ = guest.space.clearYoung(at(n)..<at(end))
            case 5 where step % 5 == 0:
                try guest.deleteSlot()
                #expect(guest.load(n, cpu: cpu) == .mmio)
                try guest.setSlot(pages: Self.count, log: isLogging)
                written = []
            case 6, 7: #expect(guest.load(n, cpu: cpu) == .value(content[n]), "seed \(seed), step \(step)")
            case 8: #expect(guest.cpus[cpu].access(.execute, gfn(n).address) == .value(content[n]))
            default:
                for i in n..<min(end, n + 8) {
                    #expect(guest.store(i, UInt64(step), cpu: cpu) == .stored)
                    content[i] = UInt64(step)
                    written.insert(i)
                }
            }
            guest.check()
            // The old policies mark pages by the numbers in entries: what I-4 is about.
            let findings = guest.test.journal.findings.filter { policy == .precise || $0.invariant != .i4 }
            guard findings.isEmpty else {
                Issue.record("seed \(seed), step \(step): \(findings)")
                return
            }
        }
        for i in 0..<Self.count where content[i] != 0 { #expect(try guest.space.load(at(i)) == content[i]) }
        guest.takeDown()
        guest.expectedFindings = guest.test.journal.findings.filter { $0.invariant == .i4 }.count
    }
}
