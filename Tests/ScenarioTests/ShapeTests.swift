import Frames
import Testing

@testable import Scenario

/// Unknown keys, wrong types, missing keys.
@Suite struct EveryKeyIsInTheVocabulary {
    @Test func `an unknown key, with what was probably meant`() {
        expectOne(
            Sketch(host: "  memry: 16 MiB"), at: "memry", "`memry` is not a key of `host`",
            hint: "did you mean `memory`? `host` has: memory, device_memory, vram, graphics_system_memory, "
                + "swap, swap_speed, reclaim, hugetlb_2m, hugetlb_1g, transparent_huge_pages, regions")
    }
    @Test func `an unknown key that resembles none`() {
        expectOne(
            Sketch(top: "colour: red"), at: "colour", "`colour` is not a key of a scenario",
            hint: "a scenario has: name, architecture, host, vm, phases, expect, known")
    }
    @Test func `an unknown key of a region`() {
        expectOne(
            Sketch(regions: "    - {name: ram, kind: anonymous, sise: 4 KiB, size: 64 KiB}"), at: "sise",
            "`sise` is not a key of a region")
    }
    @Test func `a key that belongs to another action`() {
        expectOne(
            Sketch(phases: "  - vcpu0:\n      - read: ram\n        value: 7"), at: "value",
            "`value` is not a key of a `read` step", hint: "a `read` step has: read, count, stride, expect")
    }
    @Test func `a missing key`() {
        expectOne(
            Sketch(regions: "    - {name: ram, kind: anonymous}"), at: "{name", "a region needs `size`",
            hint: "`size` is bytes, whole pages, for example `size: 64 KiB`")
    }
    @Test func `a missing parameter`() {
        expectOne(
            Sketch(phases: "  - host:\n      - madvise: ram"), at: "madvise", "a `madvise` step needs `advice`")
    }
    @Test func `an unknown architecture`() {
        expectOne(
            Sketch(top: "architecture: x86-tpd"), at: "x86-tpd", "`architecture` can't be `x86-tpd`",
            hint: "did you mean `x86-tdp`? expected one of: x86-tdp, riscv-sv39x4, riscv-sv48x4, x86-shadow, "
                + "x86-tdp-legacy")
    }
    @Test func `an unknown kind of region`() {
        expectOne(
            Sketch(regions: "    - {name: ram, kind: vmalloc, size: 64 KiB}"), at: "vmalloc",
            "`kind` can't be `vmalloc`")
    }
    @Test func `an unknown step`() {
        expectOne(
            Sketch(phases: "  - host:\n      - munmapp: ram"), at: "munmapp", "`munmapp` is not a step of the host")
    }
    @Test func `a host's step on a vCPU`() {
        expectOne(
            Sketch(phases: "  - vcpu0:\n      - munmap: ram"), at: "munmap",
            "`munmap` is a step of the host, not a step of a vCPU", hint: "put it under `host:` (munmap(2))")
    }
    @Test func `a guest's step on the host`() {
        expectOne(
            Sketch(phases: "  - host:\n      - write: ram"), at: "write",
            "`write` is a step of a vCPU, not a step of the host",
            hint: "use `store` here, or put it under `vcpu0:` (the guest stores 8 bytes)")
    }
    @Test func `two actions in a step`() {
        expectOne(
            Sketch(phases: "  - vcpu0:\n      - read: ram\n        write: ram"), at: "write",
            "a step with two actions, `read` and `write`")
    }
    @Test func `an unknown statistic`() {
        expectOne(
            Sketch(top: "expect: {statistics: {pf_fixd: 3}}"), at: "pf_fixd", "`pf_fixd` is not a key of `statistics`")
    }
    @Test func `an unknown flag`() {
        expectOne(
            Sketch(slots: "    - {slot: 0, guest_phys_addr: 0, userspace_addr: ram, flags: [read_only]}"),
            at: "read_only", "`flags` can't be `read_only`")
    }
    @Test func `precise has no known deviations`() {
        expectOne(Sketch(top: "known: {precise: [I-5]}"), at: "precise", "`precise` is not a key of `known`")
    }
    @Test func `an unknown rule`() {
        expectOne(Sketch(top: "known: {guess: [I-99]}"), at: "I-99", "`I-99` is not a rule")
    }
    @Test func `several mistakes are told together, in the order of the file`() {
        let found = errors(Sketch(top: "colour: red", host: "  memry: 1", regions: "    - {name: ram}").text)
        #expect(
            found.map(\.message) == [
                "`colour` is not a key of a scenario", "`memry` is not a key of `host`", "a region needs `kind`",
                "a region needs `size`",
            ])
        #expect(found.map(\.line) == [2, 4, 6, 6])
    }
    @Test func `no more than twenty are shown`() {
        let steps = String(repeating: "      - nonsense: 1\n", count: 50)
        let found = errors(Sketch(phases: "  - host:\n" + steps).text)
        #expect(found.count == 20)
        #expect(found.last?.hint.hasSuffix("(30 more errors follow)") == true)
    }
    @Test func `the description has the place, the line with a caret, and the remedy`() {
        let error = errors(Sketch(host: "  memry: 16 MiB").text).first
        #expect(
            error?.description == """
                test.yaml:3:3: error: `memry` is not a key of `host`
                      memry: 16 MiB
                      ^
                  did you mean `memory`? `host` has: memory, device_memory, vram, graphics_system_memory, \
                swap, swap_speed, reclaim, hugetlb_2m, hugetlb_1g, transparent_huge_pages, regions
                """)
    }
}

@Suite struct EveryValueHasItsType {
    @Test(arguments: ["64 KB", "64K", "-4096", "010", "0x", "4.5 KiB", "1__0", "lots", "0xg", "99999999999999999999"])
    func `a size that is none`(_ size: String) {
        expectOne(
            Sketch(regions: "    - {name: ram, kind: anonymous, size: \(size)}"), at: size, after: "size: ",
            "`size` can't be `\(size)`",
            hint: "a size: `64 KiB`, `2 MiB`, `4096`, `0x1000`; for example `size: 64 KiB`")
    }
    @Test(arguments: ["65536", "0x10000", "64 KiB", "64KiB", "65_536", "0x1_0000"])
    func `one size, written in several ways`(_ size: String) throws {
        let file = try loadScenario(
            text: Sketch(regions: "    - {name: ram, kind: anonymous, size: \(size)}").text, file: "test.yaml")
        #expect(file.plan.regions.map(\.size) == [65536])
    }
    @Test func `a list where a size belongs`() {
        expectOne(
            Sketch(regions: "    - {name: ram, kind: anonymous, size: [4096]}"), at: "[4096]", "`size` can't be a list")
    }
    @Test func `nothing where a size belongs`() {
        expectOne(Sketch(host: "  memory:"), at: "memory", "`memory` can't be nothing")
    }
    @Test(arguments: ["yes", "1", "\"true\"", "True"])
    func `only true and false are flags`(_ flag: String) {
        let shown = flag.filter { $0 != "\"" }
        expectOne(
            Sketch(vm: "  allow_unsafe_mappings: \(flag)"), at: flag, after: "mappings: ",
            "`allow_unsafe_mappings` can't be `\(shown)`")
    }
    @Test func `a mapping where a list belongs`() {
        expectOne(
            Sketch(regions: "    {name: ram}"), at: "{name", "expected a list, found a mapping")
    }
    @Test func `a text where a mapping belongs`() {
        expectOne(Sketch(phases: "  - nothing"), at: "nothing", after: "- ", "expected a phase, found `nothing`")
    }
    @Test func `a name with a plus`() {
        expectOne(
            Sketch(regions: "    - {name: ram+1, kind: anonymous, size: 4 KiB}"), at: "ram+1", "`name` can't be `ram+1`"
        )
    }
    @Test func `a value that needs more than 64 bits`() {
        expectOne(
            Sketch(phases: "  - vcpu0:\n      - write: ram\n        value: 0x1_0000_0000_0000_0000"), at: "0x1_",
            "`value` can't be `0x1_0000_0000_0000_0000`")
    }
    @Test func `a count of zero`() {
        expectOne(
            Sketch(phases: "  - vcpu0:\n      - read: ram\n        count: 0"), at: "0", after: "count: ",
            "`count` can't be 0", hint: "it is at least 1 and at most 1048576")
    }
    @Test func `too many vCPUs`() {
        expectOne(Sketch(vm: "  vcpus: 17"), at: "17", "`vcpus` can't be 17")
    }
    @Test func `an answer that a write can't give`() {
        expectOne(
            Sketch(phases: "  - vcpu0:\n      - write: ram\n        expect: 7"), at: "7", after: "expect: ",
            "`expect` can't be `7` here",
            hint: "expected `ok`, `mmio`, `dirty_ring_full`, `memory_fault`, `page_fault`, an error (`EFAULT`, ...), "
                + "`{any_of: [...]}`, `anything` (in a race), or one per architecture")
    }
    @Test func `an error that nobody knows`() {
        expectOne(
            Sketch(phases: "  - vcpu0:\n      - read: ram\n        expect: EOOPS"), at: "EOOPS",
            "`expect` can't be `EOOPS` here")
    }
    @Test func `pages must go upwards`() {
        expectOne(
            Sketch(phases: "  - host:\n      - get_dirty_log: 0\n        expect: {pages: [3, 1]}"), at: "1",
            after: "3, ",
            "page 1 after page 3")
    }
    @Test func `an answer that leaves out an architecture`() {
        expectOne(
            Sketch(phases: "  - vcpu0:\n      - read: ram\n        expect: {x86-tdp: ok, riscv-sv39x4: ok}"),
            at: "{x86",
            "`expect` says nothing about `riscv-sv48x4`", hint: "add `riscv-sv48x4` or `otherwise`")
    }
    @Test func `a fork takes no value`() {
        expectOne(Sketch(phases: "  - host:\n      - fork: now"), at: "now", "`fork` takes no value, found `now`")
    }
    @Test func `errors are listed completely`() {
        let listed = Set(Vocabulary.errors.map(\.rawValue))
        for raw in Int32(0)...4096 where Errno(rawValue: raw) != nil { #expect(listed.contains(raw), "\(raw)") }
    }
}
