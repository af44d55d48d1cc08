import Frames
import Machine
import Testing

@testable import Scenario

/// Host memory that can't be.
@Suite struct RegionsFitTheHost {
    private func region(_ text: String) -> Sketch { Sketch(regions: "    - {name: ram, \(text)}") }

    @Test func `a size of zero`() {
        expectOne(
            region("kind: anonymous, size: 0"), at: "0", after: "size: ", "a region can't have 0 bytes",
            hint: "a size is a multiple of 4 KiB, and not zero")
    }
    @Test func `a size that isn't whole pages`() {
        expectOne(region("kind: anonymous, size: 5000"), at: "5000", "a region can't have 5000 bytes")
    }
    @Test func `a region larger than the host's memory`() {
        expectOne(
            region("kind: anonymous, size: 1 GiB"), at: "1 GiB", "`ram` doesn't fit the host's memory",
            hint: "16 MiB are left for it; raise `host: {memory: ...}`")
    }
    @Test func `regions that together are larger than the host's memory`() {
        expectOne(
            Sketch(
                regions: "    - {name: ram, kind: anonymous, size: 10 MiB}\n"
                    + "    - {name: more, kind: memfd, size: 7 MiB}"), at: "7 MiB",
            "`more` doesn't fit the host's memory", hint: "6 MiB are left for it; raise `host: {memory: ...}`")
    }
    @Test func `a BAR on a host without device memory`() {
        expectOne(
            region("kind: device_bar, size: 64 KiB"), at: "64 KiB", "`ram` doesn't fit the host's device memory",
            hint: "0 bytes are left for it; raise `host: {device_memory: ...}`")
    }
    @Test func `a host without memory`() {
        expectOne(Sketch(host: "  memory: 4 KiB"), at: "4 KiB", "the host can't have 4 KiB of memory")
    }
    @Test func `two regions of one name`() {
        expectOne(
            Sketch(
                regions: "    - {name: ram, kind: anonymous, size: 4 KiB}\n    - {name: ram, kind: memfd, size: 8 KiB}"),
            at: "ram", after: "name: ", "a second region named `ram`", line: 5)
    }
    @Test func `overlapping regions`() {
        expectOne(
            Sketch(
                regions: "    - {name: ram, kind: anonymous, size: 64 KiB, address: 0x10000000}\n"
                    + "    - {name: blob, kind: memfd, size: 64 KiB, address: 0x1000f000}"), at: "0x1000f000",
            "`blob` overlaps `ram` in the address space",
            hint: "`ram` takes 0x10000000 up to 0x10010000; leave `address` out to have one assigned")
    }
    @Test(arguments: ["0x10000800", "0", "0x7ffffffff000"])
    func `an address that can't be`(_ address: String) {
        expectOne(
            region("kind: anonymous, size: 64 KiB, address: \(address)"), at: address, after: "address: ",
            "a region can't be at \(address == "0" ? "0x0" : address)")
    }
    @Test func `a buffer of broken blocks`() {
        expectOne(
            region("kind: graphics_buffer, size: 20 KiB, order: 2"), at: "20 KiB",
            "20 KiB are not whole blocks of order 2", hint: "a block of order 2 has 16 KiB")
    }
    @Test func `an order where there are no blocks`() {
        expectOne(region("kind: anonymous, size: 64 KiB, order: 2"), at: "order", "`order` on `anonymous`")
    }
    @Test func `huge pages on a host that has none`() {
        expectOne(
            region("kind: anonymous, size: 2 MiB, huge_pages: true"), at: "huge_pages",
            "`huge_pages` on a host without huge pages")
    }
    @Test func `huge pages of a buffer`() {
        expectOne(
            region("kind: memfd, size: 2 MiB, huge_pages: true"), at: "huge_pages", "`huge_pages` on `memfd`")
    }
    @Test func `addresses are assigned in order, aligned, past those given`() throws {
        let text = Sketch(
            regions: """
                    - {name: ram, kind: anonymous, size: 64 KiB}
                    - {name: given, kind: anonymous, size: 64 KiB, address: 0x7f0000401000}
                    - {name: more, kind: anonymous, size: 3 MiB}
                    - {name: last, kind: anonymous, size: 4 KiB}
                """
        ).text
        let addresses = try loadScenario(text: text, file: "test.yaml").plan.regions.map {
            Quantity.hex($0.address.value)
        }
        #expect(addresses == ["0x7f0000000000", "0x7f0000401000", "0x7f0000600000", "0x7f0000c00000"])
    }
    @Test func `words and cases stand in the same order`() {
        #expect(Vocabulary.regionKinds.count == RegionKind.allCases.count)
        #expect(Vocabulary.kind("graphics_buffer") == .graphicsBuffer)
        #expect(Vocabulary.kind("write_notify_pfnmap") == .writeNotifyPFNMap)
        #expect(Vocabulary.kind("mixedmap") == .mixedMap)
        #expect(Vocabulary.word(.deviceBAR) == "device_bar")
        #expect(Vocabulary.architectures.count == Architecture.allCases.count)
        #expect(Vocabulary.word(.x86TDP) == "x86-tdp")
        #expect(Vocabulary.word(.riscvSv48x4) == "riscv-sv48x4")
        #expect(Vocabulary.word(.x86Shadow) == "x86-shadow")
        #expect(Vocabulary.word(.x86TDPLegacy) == "x86-tdp-legacy")
        #expect(Vocabulary.guestRights.map(\.word) == GuestRights.allCases.map { "\($0)" })
    }
}

/// Slots that KVM would refuse, or that lead nowhere.
@Suite struct SlotsFitTheGuest {
    private func slot(_ text: String) -> Sketch { Sketch(slots: "    - {slot: 0, \(text)}") }

    @Test func `overlapping slots`() {
        expectOne(
            Sketch(
                slots: "    - {slot: 0, guest_phys_addr: 0x10000, userspace_addr: ram}\n"
                    + "    - {slot: 1, guest_phys_addr: 0x18000, userspace_addr: ram}"), at: "1", after: "slot: ",
            "slot 1 overlaps slot 0 in the guest", hint: "slot 0 takes 0x10000 up to 0x20000")
    }
    @Test func `two slots of one id`() {
        expectOne(
            Sketch(
                slots: "    - {slot: 0, guest_phys_addr: 0x10000, userspace_addr: ram}\n"
                    + "    - {slot: 0, guest_phys_addr: 0x80000, userspace_addr: ram}"), at: "0", after: "slot: ",
            "a second slot 0", line: 8)
    }
    @Test func `a slot of an unknown region`() {
        expectOne(
            slot("guest_phys_addr: 0, userspace_addr: rom"), at: "rom", "there is no region `rom`",
            hint: "did you mean `ram`? the regions are: ram")
    }
    @Test func `a slot beyond its region`() {
        expectOne(
            slot("guest_phys_addr: 0, userspace_addr: ram+0x8000, memory_size: 64 KiB"), at: "64 KiB",
            after: "memory_size: ",
            "slot 0 reaches beyond `ram`", hint: "`ram` has 64 KiB and the slot begins 32 KiB into it")
    }
    @Test func `a slot that begins at the end of its region`() {
        expectOne(
            slot("guest_phys_addr: 0, userspace_addr: ram+64 KiB"), at: "ram+64 KiB", "slot 0 reaches beyond `ram`")
    }
    @Test func `a misaligned guest address`() {
        expectOne(slot("guest_phys_addr: 0x10800, userspace_addr: ram"), at: "0x10800", "a slot can't be at 0x10800")
    }
    @Test func `a misaligned offset`() {
        expectOne(
            slot("guest_phys_addr: 0, userspace_addr: ram+0x10, memory_size: 4 KiB"), at: "ram+0x10",
            "a slot can't begin 16 bytes into a region")
    }
    @Test func `a size of zero`() {
        expectOne(
            slot("guest_phys_addr: 0, userspace_addr: ram, memory_size: 0"), at: "0", after: "memory_size: ",
            "a slot can't have 0 bytes")
    }
    @Test(arguments: [
        ("x86-tdp", "0x1_0000_0000_0000", 48), ("riscv-sv39x4", "0x200_0000_0000", 41),
        ("riscv-sv48x4", "0x4_0000_0000_0000", 50), ("x86-shadow", "0x4000_0000_0000", 46),
        ("x86-tdp-legacy", "0x1_0000_0000_0000", 48),
    ])
    func `addresses have the architecture's width`(_ architecture: String, _ address: String, _ bits: Int) {
        var sketch = slot("guest_phys_addr: \(address), userspace_addr: ram")
        sketch.top = "architecture: \(architecture)"
        expectOne(
            sketch, at: address, "slot 0 ends beyond the guest's addresses",
            hint: "on \(architecture) they have \(bits) bits, the last is 0x"
                + String(UInt64(1) << UInt64(bits) - 1, radix: 16))
    }
    @Test func `a scenario says on which architectures its addresses exist`() throws {
        var sketch = slot("guest_phys_addr: 0x200_0000_0000, userspace_addr: ram")
        #expect(
            try loadScenario(text: sketch.text, file: "t").architectures == [
                .x86TDP, .riscvSv48x4, .x86Shadow, .x86TDPLegacy,
            ])
        sketch = slot("guest_phys_addr: 0x1ff_ffff_0000, userspace_addr: ram")
        #expect(try loadScenario(text: sketch.text, file: "t").architectures == Architecture.allCases)
    }
    @Test func `an id that KVM keeps for itself`() {
        expectOne(
            Sketch(slots: "    - {slot: 32764, guest_phys_addr: 0, userspace_addr: ram}"), at: "32764",
            "`slot` can't be 32764")
    }
}
