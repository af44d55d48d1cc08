import IoctlScript
import Testing

@testable import LinuxKVM

/// The executor's own slot lies beside everything that a script names.
@Suite struct OwnPlaces {
    private func place(_ lines: String...) throws -> OwnPlace {
        OwnPlace(
            beside: try Script(
                text: (["vm", "vcpu", "host name=r kind=none size=64k"] + lines).joined(separator: "\n"), file: "test"),
            width: 48)
    }

    @Test func `it stays where nothing is in its way`() throws {
        #expect(try place("region slot=0 gpa=0 size=1G hva=r", "guest read cpu=0 gpa=0 count=9") == OwnPlace())
    }

    @Test func `it makes way for slots, accesses, logs and ranges`() throws {
        let first = OwnPlace()
        #expect(try place("get_dirty_log slot=\(first.slot)").slot == first.slot + 1)
        #expect(try place("region slot=\(first.slot) gpa=0 size=4k hva=r").slot == first.slot + 1)
        for line in [
            "region slot=0 gpa=\(first.address - 4096) size=8k hva=r", "prefault cpu=0 gpa=\(first.address) size=4k",
            "attributes gpa=0 size=\(first.address + 4096) attributes=none",
            "guest read cpu=0 gpa=\(first.address + OwnPlace.size - 8)",
            "guest read cpu=0 gpa=\(first.address - 8192) count=3",
            "guest read cpu=0 gpa=\(first.address + (1 << 21)) count=1024 stride=0xfffffffffffff000",
            "guest read cpu=0 gpa=\(first.address - (1 << 30)) count=2 stride=1G",
        ] {
            let found = try place(line)
            #expect(found.address != first.address, "\(line)")
        }
        #expect(try place("guest read cpu=0 gpa=\(first.address - (1 << 20)) count=2 stride=2M") == first)
    }

    @Test func `a slot of all addresses below 2^36 leaves some above`() throws {
        #expect(try place("region slot=0 gpa=0 size=0x1000000000 hva=r").address >= 1 << 36)
    }
}
