import Frames
import Machine
import Testing

@testable import Scenario

/// A guest's own page tables, as words of a scenario.
@Suite struct WordsOfGuestTables {
    private func sketch(_ steps: String, vm: String = "") -> Sketch {
        Sketch(top: "architecture: x86-shadow", vm: vm, phases: "  - vcpu0:\n      - \(steps)")
    }
    private func plan(_ sketch: Sketch) throws -> Plan { try loadScenario(text: sketch.text, file: "test.yaml").plan }

    @Test func `the whole list`() throws {
        let plan = try plan(
            sketch(
                [
                    "{map_page: 0x40_0000, to: ram+4 KiB}",
                    "{map_page: 0x60_0000, to: 0x20_0000, level: 2, rights: read, expect: any}",
                    "{unmap_page: ram, level: 3}", "{protect_page: ram+8 KiB, rights: clean}",
                    "{restore_page: ram, level: 2}", "invlpg: 0x40_0000", "load_cr3",
                    "{read: 0x40_0000, expect: page_fault}",
                ].joined(separator: "\n      - ").replacing("expect: any}", with: "expect: anything}")))
        #expect(
            plan.phases[0].tasks[0].steps.map(\.action) == [
                .mapPage(at: GuestAddress(0x40_0000), to: GuestAddress(0x11000), level: 1, .write),
                .mapPage(at: GuestAddress(0x60_0000), to: GuestAddress(0x20_0000), level: 2, .read),
                .unmapPage(at: GuestAddress(0x10000), level: 3),
                .protectPage(at: GuestAddress(0x12000), level: 1, .clean),
                .restorePage(at: GuestAddress(0x10000), level: 2),
                .flushPage(at: GuestAddress(0x40_0000)), .loadCR3,
                .guest(.read, at: GuestAddress(0x40_0000), count: 1, stride: 4096, value: 0),
            ])
        #expect(plan.phases[0].tasks[0].steps.last?.expectation == .pageFault)
        #expect(plan.changesGuestTables && plan.fits(.x86Shadow) && !plan.fits(.x86TDP))
    }
    @Test(arguments: ["invlpg: ram", "load_cr3", "unmap_page: ram", "{map_page: ram, to: ram}"])
    func `only under shadow paging`(_ step: String) {
        let found = errors(Sketch(phases: "  - vcpu0:\n      - \(step)").text)
        #expect(found.count == 1)
        #expect(found.first?.message.hasSuffix("on x86-tdp") == true)
        #expect(found.first?.hint.contains("architecture: x86-shadow") == true)
    }
    @Test func `an entry maps a page of its size`() {
        expectOne(
            sketch("{map_page: 0x40_0000, to: ram+8}"), at: "ram+8", "0x10008 is no page of 4 KiB")
        expectOne(
            sketch("{map_page: 0x40_0000, to: ram, level: 2}"), at: "ram", after: "to: ",
            "0x10000 is no page of 2 MiB")
        expectOne(
            sketch("{map_page: 0x40_0000, to: ram, level: 3}"), at: "3", after: "level: ", "`map_page` at level 3")
    }
    @Test func `where the guest maps memory is memory`() throws {
        #expect(errors(sketch("read: 0x40_0000").text).count == 1)
        #expect(errors(sketch("{map_page: 0x40_0000, to: ram}\n      - read: 0x40_0000").text).isEmpty)
    }
    @Test func `addresses have 46 bits`() {
        expectOne(
            sketch("invlpg: 0x4000_0000_0000"), at: "0x4000_0000_0000",
            "0x400000000000 is beyond the guest's addresses")
    }

    // MARK: Where the tables lie

    @Test func `in a region of the scenario's`() throws {
        let plan = try plan(sketch("read: ram", vm: "  page_tables: ram"))
        #expect(plan.pageTables == 0)
        #expect(GuestTables(plan).base == GuestAddress(0x10000))
    }
    @Test func `not in any`() {
        expectOne(sketch("load_cr3", vm: "  page_tables: rom"), at: "rom", "there is no region `rom`")
        var bar = sketch("load_cr3", vm: "  page_tables: bar")
        bar.regions += "\n    - {name: bar, kind: device_bar, size: 64 KiB}"
        bar.host = "  device_memory: 64 KiB"
        expectOne(bar, at: "bar", after: "page_tables: ", "the guest can't have its page tables in `bar`")
    }
    @Test func `not without a slot`() {
        var other = sketch("load_cr3", vm: "  page_tables: other")
        other.regions += "\n    - {name: other, kind: anonymous, size: 64 KiB}"
        expectOne(other, at: "other", after: "page_tables: ", "no slot shows `other` from its start")
    }
    @Test func `they must fit`() {
        var small = sketch("{map_page: ram, to: ram}", vm: "  page_tables: tables")
        small.regions += "\n    - {name: tables, kind: memfd, size: 12 KiB}"
        small.slots += "\n    - {slot: 1, guest_phys_addr: 0x40_0000, userspace_addr: tables}"
        expectOne(small, at: "tables", after: "page_tables: ", "the guest's page tables take 20 KiB")
    }

    // MARK: Answers

    @Test func `x86 names both, and one of them speaks for the other`() throws {
        func expectation(_ answer: String) throws -> StepPlan {
            try plan(Sketch(phases: "  - vcpu0: [{read: ram, expect: \(answer)}]")).phases[0].tasks[0].steps[0]
        }
        let family = try expectation("{x86: 1, riscv: 2}")
        #expect(family.expectation(on: .x86TDP) == .value(1) && family.expectation(on: .x86Shadow) == .value(1))
        let one = try expectation("{x86-tdp: 1, riscv: 2}")
        #expect(one.expectation(on: .x86Shadow) == .value(1))
        let rest = try expectation("{x86-tdp: 1, otherwise: 2}")
        #expect(rest.expectation(on: .x86Shadow) == .value(2))
        let exact = try expectation("{x86: 1, x86-shadow: 3, riscv: 2}")
        #expect(exact.expectation(on: .x86TDP) == .value(1) && exact.expectation(on: .x86Shadow) == .value(3))
    }
}
