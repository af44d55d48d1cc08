import Machine
import Testing
import TextInput

@testable import Scenario

/// Whatever stands in a file: a whole plan or errors with their place, and never a trap.
@Suite struct AnyInputHasAnAnswer {
    static let rounds = 400

    private func answer(_ bytes: [UInt8], _ seed: UInt64, _ round: Int) {
        do throws(ScenarioErrors) {
            let plan = try loadScenario(bytes: bytes, file: "fuzz.yaml").plan
            #expect((try? Plan(decoding: plan.encoded())) == plan, "seed \(seed), round \(round)")
        } catch {
            let lines = bytes.count { $0 == 0x0a } + 1
            #expect(!error.errors.isEmpty)
            for each in error.errors {
                let isPlaced = (1...lines).contains(each.line) && each.column >= 1 && !each.message.isEmpty
                #expect(isPlaced, "seed \(seed), round \(round): \(each)")
            }
            // The excerpt is cut out of the line without a trap, wherever the column lies.
            #expect(!error.description.isEmpty)
        }
    }

    @Test func `bytes changed at random`() throws {
        var random = RandomSource.fresh()
        print("seed \(random.seed)")
        let originals = try shipped.map { try bytes(of: "Scenarios/\($0).yaml") }
        for round in 0..<Self.rounds {
            var bytes = random.pick(originals)
            for _ in 0...random.below(4) { mutate(&bytes, &random) }
            answer(bytes, random.seed, round)
        }
    }

    private func mutate(_ bytes: inout [UInt8], _ random: inout RandomSource) {
        guard !bytes.isEmpty else { return }
        let place = random.below(bytes.count)
        switch random.below(5) {
        case 0: bytes[place] = UInt8(truncatingIfNeeded: random.next())
        case 1: bytes.remove(at: place)
        case 2: bytes.insert(random.pick(Array(" \n-:[]{},#'\"&*!|>?0x9ae".utf8)), at: place)
        case 3: bytes.removeLast(bytes.count - place)
        default:
            let end = min(bytes.count, place + random.below(40))
            bytes.insert(contentsOf: bytes[place..<end], at: random.below(bytes.count))
        }
    }

    /// Lines and values exchanged: files that stay YAML, so that the later stages get their share.
    @Test func `lines and values exchanged at random`() throws {
        var random = RandomSource.fresh()
        print("seed \(random.seed)")
        let originals = try shipped.map {
            try text(of: "Scenarios/\($0).yaml").split(separator: "\n", omittingEmptySubsequences: false)
        }
        let values = [
            "0", "1", "-1", "0xffff_ffff_ffff_ffff", "0xffff_ffff_ffff_fff8", "18446744073709551615", "64 KiB",
            "9_999_999_999 GiB", "ram", "blob+0x1000", "ram+16777215 GiB", "ok", "mmio", "EFAULT", "[]", "{}", "true",
            "{pages: [0]}", "{counting_from: 1}", "{x86-tdp: ok, otherwise: mmio}", "~", "", "anonymous", "device_bar",
            "0x1_0000_0000_0000", "4096", "[readonly]", "initially_set",
        ]
        for round in 0..<Self.rounds {
            var lines = random.pick(originals).map(String.init)
            for _ in 0...random.below(3) {
                let place = random.below(lines.count)
                if random.flip(), let colon = lines[place].firstIndex(of: ":") {
                    lines[place] = lines[place][...colon] + " " + random.pick(values)
                } else if random.flip() {
                    lines.swapAt(place, random.below(lines.count))
                } else {
                    lines.insert(random.pick(lines), at: place)
                }
            }
            answer(Array(lines.joined(separator: "\n").utf8), random.seed, round)
        }
    }

    @Test func `random bytes`() {
        var random = RandomSource.fresh()
        print("seed \(random.seed)")
        for round in 0..<Self.rounds {
            let bytes = (0..<random.below(200)).map { _ in UInt8(truncatingIfNeeded: random.next()) }
            answer(bytes, random.seed, round)
        }
    }
}
