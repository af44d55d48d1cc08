import Frames
import GuestMemory
import HostMemory
import Paging
import Testing

/// C1, C2, I-7: whatever happened, the tables show what the process's own tables show, hardware reads them so, and the
/// log has every write. Random runs, each repeatable from its seed.
@Suite struct I7_RISCVAgreement {
    private static let pages = 1040

    @Test(arguments: GStageMMU.Mode.allCases, [UInt64(1), 2, 3, 4, 5, 6, 7, 8])
    func `tables agree with the process after any sequence of events`(mode: GStageMMU.Mode, seed: UInt64) throws {
        var random = TestRandom(seed: seed &* 0x9e37_79b9_7f4a_7c15)
        let guest = RISCVGuest(mode, ramFrames: 8192)
        try guest.anonymous(count: Self.pages, huge: seed % 2 == 0)
        var log: Bool = false
        var unreported = Set<UInt64>()
        for step in 0..<120 {
            let n = UInt64.random(in: 0..<UInt64(Self.pages), using: &random)
            let end = Int(n) + Int.random(in: 1...min(600, Self.pages - Int(n)), using: &random)
            switch UInt64.random(in: 0..<12, using: &random) {
            case 0: try guest.space.advise(at(Int(n))..<at(end), .dontNeed)
            case 1: try guest.space.protect(at(Int(n))..<at(end), .read)
            case 2: try guest.space.protect(at(Int(n))..<at(end), .readWrite)
            case 3:
                log.toggle()
                unreported = []
                // A slot that takes writes may not be changed over memory that the process can't write.
                try guest.space.protect(at(0)..<at(Self.pages), .readWrite)
                try guest.slot(0, 0, count: Self.pages, log: log)
            case 4 where log: try harvest(guest, &unreported, "seed \(seed), step \(step)")
            case 5: _ = guest.age(n..<UInt64(end))
            default: play(guest, n, step % 3 == 0 ? .write : step % 3 == 1 ? .read : .execute, log, &unreported)
            }
            #expect(guest.mmu.checkTables() == [], "seed \(seed), step \(step)")
        }
        if log { try harvest(guest, &unreported, "seed \(seed), at the end") }
        guest.expectSound()
        guest.end()
    }

    /// One access of the guest: hardware first, and a fault where it stops.
    private func play(
        _ guest: RISCVGuest, _ n: UInt64, _ access: AccessKind, _ log: Bool, _ unreported: inout Set<UInt64>
    ) {
        while guest.walk(n, access).translation == nil {
            switch guest.fault(n, access) {
            case .fixed, .retry: continue
            case .failed(.EFAULT) where access == .write: return  // the process itself may not write there
            case let other:
                Issue.record("page \(n), \(access): \(other)")
                return
            }
        }
        let seen = guest.walk(n, access).translation
        #expect(seen != nil && seen?.frame == guest.hostFrame(Int(n)))
        if access == .write, log { unreported.insert(n) }
    }

    /// I-12: every page written since the last report is in this one.
    private func harvest(_ guest: RISCVGuest, _ unreported: inout Set<UInt64>, _ place: String) throws {
        let words = try guest.vm.getDirtyLog(slot: 0)
        for n in unreported {
            let reported = words[Int(n / 64)] >> (n % 64) & 1 == 1
            #expect(reported, "page \(n), \(place)")
        }
        unreported = []
    }
}
