import Frames
import Machine
import Testing

@testable import Scenario

/// Steps that lead out of the guest's memory, or don't suit what they are done to.
@Suite struct GuestProgramsStayInside {
    private func guest(_ text: String) -> Sketch { Sketch(phases: "  - vcpu0:\n      - {\(text)}") }

    @Test func `an access outside every slot`() {
        expectOne(
            guest("read: 0x20000"), at: "0x20000", after: "read: ", "0x20000 is not the guest's memory",
            hint: "the slots are 0: 0x10000 up to 0x20000; an access outside of them is MMIO: say `expect: mmio`")
    }
    @Test func `the last access of many is outside`() {
        expectOne(
            guest("read: ram+0x8000, count: 9"), at: "ram+0x8000", "0x20000 is not the guest's memory (access 9 of 9)")
        #expect(errors(guest("read: ram+0x8000, count: 8").text).isEmpty)
    }
    @Test func `an access outside is right if it says so`() {
        #expect(errors(guest("read: 0x20000, expect: mmio").text).isEmpty)
        #expect(errors(guest("write: 0x20000, expect: {x86-tdp: mmio, otherwise: EFAULT}").text).isEmpty)
        #expect(errors(guest("read: 0x20000, expect: EFAULT").text).count == 1)
    }
    @Test func `a fetch needs memory in any case`() {
        expectOne(
            guest("fetch: 0x20000"), at: "0x20000", "0x20000 is not the guest's memory",
            hint: "the slots are 0: 0x10000 up to 0x20000")
    }
    @Test func `an access beyond the guest's addresses is never right`() {
        expectOne(
            guest("read: 0x1_0000_0000_0000, expect: mmio"), at: "0x1_", "the access ends beyond the guest's addresses")
    }
    @Test func `addresses that wrap around`() {
        expectOne(
            guest("read: ram, count: 3, stride: 0x8000_0000_0000_0000, expect: mmio"), at: "ram", after: "read: ",
            "the access ends beyond the guest's addresses")
        expectOne(
            guest("read: 0xffff_ffff_ffff_fff8, expect: mmio"), at: "0xffff",
            "the access ends beyond the guest's addresses")
    }
    @Test func `an unaligned access`() {
        expectOne(
            guest("read: ram+0x13"), at: "ram+0x13", "0x10013 is not 8-byte aligned",
            hint: "an access has 8 bytes; the aligned address before it is 0x10010")
    }
    @Test(arguments: ["0", "4"])
    func `an unaligned stride`(_ stride: String) {
        expectOne(
            guest("read: ram, count: 2, stride: \(stride)"), at: stride, after: "stride: ",
            "a stride can't be \(stride) bytes")
    }
    @Test func `a place that no slot shows`() {
        var sketch = guest("read: ram+0x9000")
        sketch.slots = "    - {slot: 0, guest_phys_addr: 0, userspace_addr: ram, memory_size: 32 KiB}"
        expectOne(sketch, at: "ram+0x9000", "no slot shows `ram` at 36 KiB to the guest")
    }
    @Test func `a place that two slots show`() {
        var sketch = guest("read: ram")
        sketch.slots += "\n    - {slot: 1, guest_phys_addr: 0x80000, userspace_addr: ram}"
        expectOne(sketch, at: "ram", after: "read: ", "`ram` is in two slots, 0 and 1", hint: "write the guest address")
    }
    @Test func `a place in a region that there isn't`() {
        expectOne(guest("read: blob"), at: "blob", "there is no region `blob`")
    }
    @Test func `a vCPU that there isn't`() {
        expectOne(
            Sketch(phases: "  - vcpu1:\n      - read: ram"), at: "vcpu1", "there is no `vcpu1`",
            hint: "the VM has one vCPU, vcpu0; raise `vm: {vcpus: ...}`")
    }
    @Test func `a phase in which nobody does anything`() {
        expectOne(Sketch(phases: "  - name: rest"), at: "name: rest", "a phase in which nobody does anything")
    }
    @Test func `no phases at all`() { expectOne(Sketch(phases: "  []"), at: "[]", "no phases") }

    @Test func `a place is where the slot is now`() throws {
        let text = Sketch(
            phases: """
                  - vcpu0: [read: ram+0x1000]
                  - host:
                      - set_memory_region: {slot: 0, guest_phys_addr: 0x80000, userspace_addr: ram}
                  - vcpu0: [read: ram+0x1000, {read: 0x11000, expect: mmio}]
                  - host: [delete_memory_region: 0]
                  - vcpu0: [{read: ram+0x1000, expect: mmio}]
                """
        ).text
        let plan = try loadScenario(text: text, file: "test.yaml").plan
        var addresses: [UInt64] = []
        for case .guest(_, let address, _, _, _) in plan.phases.flatMap(\.tasks).flatMap(\.steps).map(\.action) {
            addresses.append(address.value)
        }
        #expect(addresses == [0x11000, 0x81000, 0x11000, 0x81000])
    }
    @Test func `memory that is gone is not the guest's any more`() {
        let sketch = Sketch(phases: "  - host: [delete_memory_region: 0]\n  - vcpu0:\n      - read: 0x10000")
        expectOne(
            sketch, at: "0x10000", after: "read: ", "0x10000 is not the guest's memory",
            hint: "there are no slots at this point; an access outside of them is MMIO: say `expect: mmio`")
    }
    @Test func `in the phase of the deletion the access may come first`() {
        #expect(errors(Sketch(phases: "  - host: [delete_memory_region: 0]\n    vcpu0: [read: ram]").text).isEmpty)
    }
}

@Suite struct HostEventsSuitTheirRegion {
    private func host(_ text: String) -> Sketch { Sketch(phases: "  - host:\n      - \(text)") }

    @Test func `moving anonymous memory`() {
        expectOne(
            host("{move: ram, to: device_memory}"), at: "ram", after: "move: ",
            "`move` is not for `ram`, which is `anonymous`", hint: "it is for: graphics_buffer")
    }
    @Test func `disabling what is no device`() {
        expectOne(
            host("disable: ram"), at: "ram", after: "disable: ", "`disable` is not for `ram`, which is `anonymous`")
    }
    @Test func `a driver behind anonymous memory`() {
        expectOne(
            host("driver_load: ram"), at: "ram", after: "load: ", "`driver_load` is not for `ram`, which is `anonymous`"
        )
    }
    @Test func `madvise on a PFN map fails on Linux, and may be tried`() {
        var sketch = host("{madvise: ram, advice: dontneed}")
        sketch.regions = "    - {name: ram, kind: reserved_memory, size: 64 KiB}"
        expectOne(sketch, at: "ram", after: "madvise: ", "`madvise` is not for `ram`, which is `reserved_memory`")
        sketch.phases = "  - host:\n      - {madvise: ram, advice: dontneed, expect: EINVAL}"
        #expect(errors(sketch.text).isEmpty)
    }
    @Test func `an offset beyond the region`() {
        expectOne(host("load: ram+64 KiB"), at: "ram+64", "64 KiB is beyond the end of `ram`")
    }
    @Test func `an unaligned load`() { expectOne(host("load: ram+4"), at: "ram+4", "0x4 is not 8-byte aligned") }
    @Test(arguments: ["0", "100", "128 KiB"])
    func `a length that can't be`(_ length: String) {
        let shown = length == "0" || length == "100" ? "\(length) bytes" : length
        expectOne(
            host("{munmap: ram, length: \(length)}"), at: length, after: "length: ",
            "`munmap` can't have a length of \(shown)")
    }
    @Test func `munmap from the middle of a page`() {
        expectOne(host("munmap: ram+0x800"), at: "ram+0x800", "`munmap` can't begin at 2 KiB")
    }
    @Test func `a child's step without a child`() {
        expectOne(host("child_exit"), at: "child_exit", "`child_exit` without a child")
        expectOne(host("child_load: ram"), at: "child_load", "`child_load` without a child")
    }
    @Test func `a child can't act after its end`() {
        expectOne(
            host("fork\n      - child_exit\n      - child_load: ram"), at: "child_load", "`child_load` without a child")
    }
    @Test func `a buffer that doesn't fit device memory`() {
        var sketch = host("{move: ram, to: device_memory}")
        sketch.regions = "    - {name: ram, kind: graphics_buffer, size: 64 KiB}"
        expectOne(sketch, at: "ram", after: "move: ", "`ram` doesn't fit the host's device memory")
        sketch.host = "  device_memory: 64 KiB"
        #expect(errors(sketch.text).isEmpty)
    }
}

@Suite struct IoctlsSuitTheirSlot {
    private func host(_ text: String) -> Sketch { Sketch(phases: "  - host:\n      - {\(text)}") }

    @Test func `deleting a slot that there isn't`() {
        expectOne(
            host("delete_memory_region: 7"), at: "7", "there is no slot 7 at this point",
            hint: "a slot is in `vm: {slots: ...}` or made by `set_memory_region`; else say `expect: EINVAL`")
        #expect(errors(host("delete_memory_region: 7, expect: EINVAL").text).isEmpty)
    }
    @Test func `the dirty log of a slot without one`() {
        expectOne(host("get_dirty_log: 0"), at: "0", after: "log: ", "slot 0 has no dirty log")
        #expect(errors(host("get_dirty_log: 0, expect: ENOENT").text).isEmpty)
    }
    @Test func `a page that the slot doesn't have`() {
        var sketch = host("get_dirty_log: 0, expect: {pages: [16]}")
        sketch.slots = "    - {slot: 0, guest_phys_addr: 0, userspace_addr: ram, flags: [log_dirty_pages]}"
        expectOne(sketch, at: "{pages", "slot 0 has no page 16", hint: "its last page is 15")
    }
    @Test func `clearing from an odd page, or an odd number`() {
        var sketch = host("clear_dirty_log: 0, first_page: 3")
        sketch.slots = "    - {slot: 0, guest_phys_addr: 0, userspace_addr: ram, flags: [log_dirty_pages]}"
        expectOne(sketch, at: "3", after: "page: ", "KVM_CLEAR_DIRTY_LOG can't begin at page 3")
        sketch.phases = "  - host:\n      - {clear_dirty_log: 0, num_pages: 3}"
        expectOne(sketch, at: "3", after: "pages: ", "KVM_CLEAR_DIRTY_LOG can't clear 3 pages from 0")
        sketch.phases = "  - host:\n      - {clear_dirty_log: 0, num_pages: 16}"
        #expect(errors(sketch.text).isEmpty)
    }
    @Test func `a slot never changes its memory`() {
        expectOne(
            host("set_memory_region: {slot: 0, guest_phys_addr: 0x10000, userspace_addr: ram, memory_size: 4 KiB}"),
            at: "{slot", after: "region: ", "slot 0 exists, and KVM answers EINVAL")
    }
    @Test func `a new slot over an old one`() {
        expectOne(
            host("set_memory_region: {slot: 1, guest_phys_addr: 0x1f000, userspace_addr: ram}"), at: "{slot",
            after: "region: ", "slot 1 overlaps slot 0 in the guest",
            hint: "slot 0 takes 0x10000 up to 0x20000, or say `expect: EEXIST`")
    }
    @Test func `a step that expects an error may ask for anything`() {
        #expect(
            errors(
                host(
                    "set_memory_region: {slot: 1, guest_phys_addr: 0x1f001, userspace_addr: ram+7, memory_size: 5}, "
                        + "expect: EINVAL"
                ).text
            ).isEmpty)
    }
}

/// A step that races may end in several ways.
@Suite struct StepsWithSeveralAnswers {
    private func guest(_ text: String) -> Sketch { Sketch(phases: "  - vcpu0:\n      - {\(text)}") }

    @Test func `any of a list`() throws {
        let text = guest("read: ram, expect: {any_of: [0x11, EFAULT, mmio, ok, {counting_from: 3}]}").text
        let step = try loadScenario(text: text, file: "test.yaml").plan.phases[0].tasks[0].steps[0]
        #expect(step.expectation == .oneOf([.value(0x11), .error(.EFAULT), .mmio, .success, .counting(from: 3)]))
    }
    @Test func `any of a list, per architecture`() throws {
        let text = guest("write: ram, expect: {x86-tdp: {any_of: [ok, mmio]}, otherwise: EFAULT}").text
        let step = try loadScenario(text: text, file: "test.yaml").plan.phases[0].tasks[0].steps[0]
        #expect(step.expectation(on: .x86TDP) == .oneOf([.success, .mmio]))
        #expect(step.expectation(on: .riscvSv48x4) == .error(.EFAULT))
    }
    @Test func `an access that may be MMIO may lie outside of the guest's memory`() {
        #expect(errors(guest("read: 0x20000, expect: {any_of: [0, mmio]}").text).isEmpty)
        #expect(errors(guest("read: 0x20000, expect: {any_of: [0, EFAULT]}").text).count == 1)
    }
    @Test func `one answer is no choice`() {
        expectOne(
            guest("read: ram, expect: {any_of: [EFAULT]}"), at: "[EFAULT]", "`any_of` needs two answers at least",
            hint: "write the answer itself after `expect:`")
    }
    @Test func `the same answer twice`() {
        expectOne(
            guest("read: ram, expect: {any_of: [0x11, mmio, 17]}"), at: "17", "`any_of` has this answer already",
            hint: "leave it out")
    }
    @Test(arguments: ["{any_of: [ok, {any_of: [mmio, EFAULT]}]}", "{any_of: [ok, anything]}", "{any_of: [ok, 7]}"])
    func `what can't be in the list`(_ answer: String) {
        #expect(errors(guest("write: ram, expect: \(answer)").text).count == 1)
    }
    @Test func `a vCPU maps a guest page for itself`() throws {
        let text = guest("map_guest_page: ram, access: read").text
        let step = try loadScenario(text: text, file: "test.yaml").plan.phases[0].tasks[0].steps[0]
        #expect(step.action == .mapGuestPage(at: GuestAddress(0x10000), write: false))
    }
}

@Suite struct UsersOfTheLog {
    private func vmm(_ text: String, task: String = "vmm") -> Sketch {
        Sketch(phases: "  - \(task):\n      - \(text)")
    }

    @Test func `the whole list`() throws {
        let text = vmm(
            "precopy: start\n      - precopy: round\n      - {precopy: stop, expect: 3}\n      - snapshot: full\n"
                + "      - snapshot: diff\n      - restore\n    host: [{vmm_store: ram+8, value: 5}, {pin: ram}]\n"
                + "    device: [{dma_store: ram, value: 6}]"
        ).text
        let plan = try loadScenario(text: text, file: "test.yaml").plan
        #expect(plan.phases[0].tasks.map(\.actor) == [.background(.vmm), .host, .background(.device)])
        #expect(
            plan.phases[0].tasks.flatMap(\.steps).map(\.action) == [
                .precopy(.start), .precopy(.round), .precopy(.stop), .snapshot(.full), .snapshot(.difference), .restore,
                .ownStore(region: 0, offset: 8, value: 5), .pin(region: 0, offset: 0, write: true),
                .deviceStore(region: 0, offset: 0, value: 6),
            ])
        #expect(plan.phases[0].tasks[0].steps[2].expectation == .value(3))
    }
    @Test(arguments: ["precopy: start", "snapshot: full", "restore"])
    func `one task of the VMM uses the log`(_ step: String) {
        let word = step.split(separator: ":")[0]
        expectOne(
            vmm(step, task: "host"), at: step, after: "- ", "`\(word)` outside of `vmm:`",
            hint: "one task of the VMM uses the log: put it under `vmm:`")
    }
    @Test(arguments: ["round", "stop"])
    func `a migration begins with its start`(_ step: String) {
        expectOne(
            vmm("precopy: \(step)"), at: "precopy", "no migration is running", hint: "`precopy: start` begins one")
        #expect(errors(vmm("{precopy: \(step), expect: EINVAL}").text).isEmpty)
    }
    @Test func `one migration at a time`() {
        let text = vmm("precopy: start\n      - precopy: start").text
        #expect(errors(text).map(\.message) == ["a second migration"])
        #expect(errors(vmm("precopy: start\n      - {precopy: start, expect: EBUSY}").text).isEmpty)
    }
    @Test func `snapshots begin with a full one, and not during a migration`() {
        #expect(errors(vmm("snapshot: diff").text).map(\.message) == ["there is no snapshot yet"])
        #expect(errors(vmm("restore").text).map(\.message) == ["there is no snapshot yet"])
        #expect(
            errors(vmm("precopy: start\n      - snapshot: full").text).map(\.message)
                == ["a snapshot during a migration"])
        let ended = "snapshot: full\n      - precopy: start\n      - precopy: stop\n      - snapshot: diff"
        #expect(errors(vmm(ended).text).map(\.message) == ["there is no snapshot yet"])
    }
}
