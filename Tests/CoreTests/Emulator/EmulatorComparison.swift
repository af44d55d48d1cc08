import Frames
import Hardware
import HostMemory
import Testing

// What comparisons with the emulator share.

extension Emulator.Answer {
    /// Of a reserved bit QEMU 7.2 tells without P, which the manuals set (Intel SDM volume 3, "Page-fault exceptions": RSVD
    /// only with P).
    var asOfTheManual: Self {
        var answer = self
        if exit == Self.nestedPageFault || exit == Self.pageFault, code & 8 != 0 { answer.code |= 1 }
        return answer
    }
}

extension Emulator.Kind {
    /// What the guest's instruction does with the word that its access reached, as the emulator tells it.
    func perform(_ memory: PhysicalMemory, _ address: UInt64) -> Emulator.Answer {
        let word = memory.word(at: address)
        switch self {
        case .load: return .init(exit: Emulator.Answer.halted, value: word.loadData() & 0xffff_ffff)
        case .store: word.storeData(word.loadData() & ~0xff | Emulator.halt)
        case .fetch: break
        }
        return .init(exit: Emulator.Answer.halted)
    }
}

/// QEMU 7.2 sets A in an entry for 1 GiB before it knows whether the access is permitted, or a bit inside of the address
/// reserved; in those for 2 MiB and 4 KiB after that. By the manuals A is of an entry that a translation uses (Intel SDM
/// volume 3, "Accessed and dirty flags"), of a page that is read or written (AMD APM volume 2, "Accessed (A) bit").
func clearGigabytePagesAccessed(_ theirs: inout [UInt64], _ mine: [UInt64], _ table: Range<Int>) {
    for i in table where mine[i] & 0x81 == 0x81 && theirs[i] == mine[i] | 1 << 5 { theirs[i] = mine[i] }
}

/// The words of a host's RAM.
func memory(of host: TestHost) -> [UInt64] {
    (0..<Int(host.memory.ram.upperBound.number) * 512).map { host.memory.word(at: UInt64($0) * 8).load() }
}

/// QEMU 7.2 sets A in the four pointers of PAE paging. By the manual they have none: reading them is no use of theirs in a
/// translation (Intel SDM volume 3, "Accessed and dirty flags", the footnote on PAE paging; AMD APM volume 2: 8:5 are
/// reserved). `first` is the first one's place.
func clearPointersAccessed(_ memory: inout [UInt64], _ first: Int) {
    for i in first..<first + 4 where memory[i] & 1 != 0 { memory[i] &= ~(1 << 5) }
}

func expectSame(
    _ mine: [UInt64], _ theirs: [UInt64], comment: String = "", _ sourceLocation: SourceLocation
) {
    let different = mine.indices.filter { mine[$0] != theirs[$0] }.prefix(4)
    let told = different.map {
        "\(String($0 * 8, radix: 16)): \(String(mine[$0], radix: 16)) \(String(theirs[$0], radix: 16))"
    }
    #expect(different.isEmpty, "words, ours and the emulator's: \(told) \(comment)", sourceLocation: sourceLocation)
}

extension AddressSpace {
    func makeCode(_ page: UserAddress) throws {
        for (offset, word) in Emulator.code { try store(page + offset, word) }
    }

    /// Pages whose byte at `target` is a halt, so that a jump there ends; a store writes the same.
    func makeTargets(_ first: UserAddress, count: Int) throws {
        for i in 0..<count { try store(first + UInt64(i) * pageSize + Emulator.target, Emulator.halt) }
    }
}

/// Lets `Hardware` walk for each access as the emulator's processor did, first for the instruction, and compares what both
/// say. Gives how often each end came.
@discardableResult
func expectAnswers(
    _ probes: [Emulator.Probe], _ answers: [Emulator.Answer], _ setup: Emulator.Setup, comment: String = "",
    _ sourceLocation: SourceLocation,
    _ walker: (Emulator.Probe) -> LegacyWalker
) throws -> EmulatorCounts {
    var counts = EmulatorCounts()
    for (probe, answer) in zip(probes, answers) {
        let walker = walker(probe)
        let code = walker.walk(setup.code(of: probe), .execute)
        guard case .translated = code else {
            Issue.record("the guest's code is not mapped: \(code)", sourceLocation: sourceLocation)
            return counts
        }
        let expected: Emulator.Answer
        switch walker.walk(probe.address, LinearAccess(probe.kind.access)) {
        case .translated(let page):
            expected = probe.kind.perform(walker.memory, page.frame.physicalAddress | probe.address & (pageSize - 1))
            counts.translated += 1
        case .pageFault(let fault):
            expected = .init(
                exit: Emulator.Answer.pageFault, code: UInt64(fault.errorCode), address: fault.address)
            counts.add(fault.reason)
        case .nonCanonical:
            expected = .init(exit: Emulator.Answer.protection)
            counts.nonCanonical += 1
        case .stageTwo(let fault):
            guard case .violation(let violation) = fault.result, case .guest(.npt(let nested)) = walker.tables else {
                Issue.record("\(probe): \(fault)", sourceLocation: sourceLocation)
                return counts
            }
            expected = .init(
                exit: Emulator.Answer.nestedPageFault,
                code: nested.errorCode(of: violation, finalTranslation: fault.finalTranslation),
                address: violation.address.value)
            if fault.finalTranslation { counts.nestedPages += 1 } else { counts.nestedTables += 1 }
        case let other:
            Issue.record("\(probe): \(other)", sourceLocation: sourceLocation)
            return counts
        }
        #expect(answer.asOfTheManual == expected, "\(probe) \(comment)", sourceLocation: sourceLocation)
    }
    return counts
}

/// Ends of walks.
struct EmulatorCounts: Equatable {
    var translated = 0
    var absent = 0
    var rights = 0
    var reserved = 0
    var nonCanonical = 0
    /// Nested page faults, of what is accessed and of a table of the guest's.
    var nestedPages = 0
    var nestedTables = 0

    mutating func add(_ reason: WalkFault.Reason) {
        switch reason {
        case .absent: absent += 1
        case .reservedBits: reserved += 1
        default: rights += 1
        }
    }
}
