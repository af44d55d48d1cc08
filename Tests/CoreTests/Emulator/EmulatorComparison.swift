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
        case .store: word.storeData(word.loadData() & ~0xffff_ffff | Emulator.halt)
        case .fetch: break
        }
        return .init(exit: Emulator.Answer.halted)
    }
}

/// The words of a host's RAM.
func memory(of host: TestHost) -> [UInt64] {
    (0..<Int(host.memory.ram.upperBound.number) * 512).map { host.memory.word(at: UInt64($0) * 8).load() }
}

func expectSame(_ mine: [UInt64], _ theirs: [UInt64], _ sourceLocation: SourceLocation) {
    let different = mine.indices.filter { mine[$0] != theirs[$0] }.prefix(4)
    let told = different.map {
        "\(String($0 * 8, radix: 16)): \(String(mine[$0], radix: 16)) \(String(theirs[$0], radix: 16))"
    }
    #expect(different.isEmpty, "words, ours and the emulator's: \(told)", sourceLocation: sourceLocation)
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
