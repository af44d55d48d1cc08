import Foundation
import Testing

/// `faultline bench host`: each row beside its limit, what the host holds, what is to be reached. Issue: "Measured".
@Suite struct HostBenchCommand {
    @Test func `a quick run prints each row with its limit`() throws {
        let result = try Command.run("bench", "host", "--quick")
        #expect(result.status == 0 && result.errors.isEmpty, "\(result.errors)")
        for row in ["get a page, any of them", "first store to a page", "fork, all pages", "exit of the child"] {
            #expect(result.output.contains(row), "\(row)")
        }
        #expect(result.output.contains("start of a host of 256 GiB"))
        #expect(result.output.contains("64 bytes a page"))
        #expect(!result.output.contains("\u{1b}"))
        #expect(result.output.split(separator: "\n").allSatisfy { $0.last != " " })
    }

    /// Times of a debug build mean nothing; what is held is the same in every build.
    @Test func `what a host holds besides page frames is at most one percent`() throws {
        let result = try Command.run("bench", "host", "--quick", "--json")
        #expect(result.status == 0)
        let report = try #require(try JSONSerialization.jsonObject(with: Data(result.output.utf8)) as? [String: Any])
        let held = try #require(report["footprint"] as? [String: Any])
        let modelled = try #require(held["modelled"] as? Int)
        let tables = try #require(held["pageTables"] as? Int)
        let objects = try #require(held["objects"] as? Int)
        #expect(held["pageFrames"] as? Int == modelled / 4096 * 64)
        // A last table for each 2 MiB, and the three above them.
        #expect(tables == (modelled / (2 << 20) + 3) * 4096)
        #expect(objects > 0 && (tables + objects) * 100 <= modelled)
        let rows = try #require(report["rows"] as? [[String: Any]])
        #expect(rows.count >= 7)
        for row in rows {
            let time = try #require(row["nanoseconds"] as? Double)
            let limit = try #require(row["limit"] as? Double)
            #expect(time > 0 && limit > 0)
        }
    }

    @Test(arguments: ["--rounds=0", "--rounds=102", "--guest=1"])
    func `wrong usage ends with 2`(_ argument: String) throws {
        let result = try Command.run("bench", "host", argument)
        #expect(result.status == 2 && result.output.isEmpty)
        #expect(result.errors.contains("Usage:"))
    }
}

/// `faultline bench slots`: lookups and changes among very many slots.
@Suite struct SlotBenchCommand {
    @Test func `a quick run prints each row with its limit, and the same numbers as JSON`() throws {
        let result = try Command.run("bench", "slots", "--quick")
        #expect(result.status == 0 && result.errors.isEmpty, "\(result.errors)")
        for row in ["a VM with 1000 slots", "slot of the last lookup", "by a vCPU", "create a slot and delete it"] {
            #expect(result.output.contains(row), "\(row)")
        }
        #expect(result.output.split(separator: "\n").allSatisfy { $0.last != " " })
        let json = try Command.run("bench", "slots", "--quick", "--json")
        let report = try #require(try JSONSerialization.jsonObject(with: Data(json.output.utf8)) as? [String: Any])
        let rows = try #require(report["rows"] as? [[String: Any]])
        #expect(rows.count == 5)
        for row in rows {
            let time = try #require(row["nanoseconds"] as? Double)
            let limit = try #require(row["limit"] as? Double)
            #expect(time > 0 && limit > 0)
        }
    }
}

/// `faultline bench x86`: each row beside its limit, what was published, what is to be reached.
@Suite struct X86BenchCommand {
    @Test func `a quick run prints each row with its limit, and what was published`() throws {
        let result = try Command.run("bench", "x86", "--quick")
        #expect(result.status == 0 && result.errors.isEmpty, "\(result.errors)")
        for row in [
            "fault, warm tables", "fault, cold tables", "eager split", "write-protect", "clear dirty", "shadow MMU",
            "published:", "62 ns for each 4 KiB entry",
        ] {
            #expect(result.output.contains(row), "\(row)")
        }
        #expect(result.output.split(separator: "\n").allSatisfy { $0.last != " " })
    }

    @Test func `the same numbers as JSON, and few atomics, none on a line that two vCPUs share`() throws {
        let result = try Command.run("bench", "x86", "--quick", "--json")
        #expect(result.status == 0)
        let report = try #require(try JSONSerialization.jsonObject(with: Data(result.output.utf8)) as? [String: Any])
        let rows = try #require(report["rows"] as? [[String: Any]])
        #expect(rows.count == 8)
        for row in rows {
            let time = try #require(row["nanoseconds"] as? Double)
            #expect(time > 0)
        }
        // Nil where the machine can't be stepped.
        guard let anatomy = report["anatomy"] as? [String: Any] else { return }
        let shared = try #require(anatomy["sharedLines"] as? Int)
        // A debug build counts references, which are shared.
        #if !DEBUG
            #expect(shared <= 1)
        #else
            #expect(shared >= 0)
        #endif
    }

    @Test(arguments: ["--rounds=0", "--cold=0", "--cold=257"])
    func `wrong usage ends with 2`(_ argument: String) throws {
        let result = try Command.run("bench", "x86", argument)
        #expect(result.status == 2 && result.output.isEmpty)
    }
}
