import Frames
import Machine
import Testing

@testable import Scenario

/// Dirty rings, private memory, frame caches, faults ahead of use and asynchronous ones, as words of a scenario.
@Suite struct WordsOfTheMachine {
    private static let privateSlot = "    - {slot: 0, guest_phys_addr: 0x10000, userspace_addr: ram, guest_memfd: true}"
    private static let loggedSlot =
        "    - {slot: 0, guest_phys_addr: 0x10000, userspace_addr: ram, flags: [log_dirty_pages]}"

    private func ringed(_ steps: String) -> Sketch {
        Sketch(vm: "  dirty_ring: 8 KiB", slots: Self.loggedSlot, phases: "  - host:\n      - \(steps)")
    }
    private func protected(_ steps: String, slot: String = privateSlot) -> Sketch {
        Sketch(vm: "  type: sw_protected", slots: slot, phases: "  - host:\n      - \(steps)")
    }
    private func plan(_ sketch: Sketch) throws -> Plan { try loadScenario(text: sketch.text, file: "test.yaml").plan }
    private func actions(_ plan: Plan) -> [Action] { plan.phases.flatMap(\.tasks).flatMap(\.steps).map(\.action) }

    // MARK: Rings

    @Test func `the whole list of rings`() throws {
        let plan = try plan(
            ringed(
                "{collect_ring: 0, expect: {pages: [16]}}\n      - reset_rings:\n        expect: 1\n    vcpu0:\n"
                    + "      - {write: ram, expect: dirty_ring_full}"))
        #expect(plan.dirtyRingBytes == 8192)
        #expect(actions(plan).prefix(2) == [.collectRing(cpu: 0), .resetRings])
        #expect(
            plan.phases[0].tasks.flatMap(\.steps).map(\.expectation) == [.pages([16]), .value(1), .dirtyRingFull])
    }
    @Test(arguments: ["0", "2 KiB", "12 KiB", "2 MiB"])
    func `no size of a ring`(_ size: String) {
        var sketch = ringed("reset_rings")
        sketch.vm = "  dirty_ring: \(size)"
        #expect(errors(sketch.text).count == 1)
    }
    @Test(arguments: ["collect_ring: 0", "reset_rings"])
    func `rings that there are not`(_ step: String) {
        let word = step.split(separator: ":")[0]
        expectOne(
            Sketch(phases: "  - host:\n      - \(step)"), at: step, after: "- ",
            "`\(word)` in a VM without dirty rings", hint: "add `dirty_ring: 64 KiB` to `vm`")
        #expect(errors(Sketch(phases: "  - host: [{reset_rings: , expect: EINVAL}]").text).isEmpty)
    }
    @Test func `a vCPU that there is not`() {
        expectOne(ringed("collect_ring: 1"), at: "1", after: "collect_ring: ", "there is no vCPU 1")
    }
    @Test(arguments: ["get_dirty_log: 0", "clear_dirty_log: 0"])
    func `bitmaps that there are not`(_ step: String) {
        let word = step.split(separator: ":")[0]
        expectOne(ringed(step), at: step, after: "- ", "`\(word)` in a VM with dirty rings")
        #expect(errors(ringed("{\(step), expect: ENXIO}").text).isEmpty)
    }
    @Test func `one task reads rings`() {
        let found = errors(ringed("reset_rings\n    vmm:\n      - collect_ring: 0").text)
        #expect(found.map(\.message) == ["a second task of the phase that reads dirty rings"])
    }

    // MARK: Private memory

    @Test func `the whole list of private memory`() throws {
        let file = try loadScenario(
            text: protected(
                "{set_private: ram+4 KiB, length: 8 KiB}\n      - set_shared: ram\n      - punch_private: ram+60 KiB\n"
                    + "    vcpu0:\n      - {read: ram, expect: memory_fault}"
            ).text, file: "test.yaml")
        #expect(file.plan.hasPrivateMemory && file.plan.slots[0].guestMemory)
        #expect(file.architectures == [.x86TDP])
        #expect(
            actions(file.plan).prefix(3) == [
                .setAttributes(at: GuestAddress(0x11000), size: 8192, isPrivate: true),
                .setAttributes(at: GuestAddress(0x10000), size: 65536, isPrivate: false),
                .punchPrivate(at: GuestAddress(0x1f000), size: 4096),
            ])
        #expect(file.plan.phases[0].tasks[1].steps[0].expectation == .memoryFault)
    }
    @Test func `private memory that there is not`() {
        expectOne(
            Sketch(phases: "  - host:\n      - set_private: ram"), at: "set_private",
            "`set_private` in a VM without private memory",
            hint: "add `type: sw_protected` to `vm`, or say `expect: EINVAL`")
        expectOne(
            Sketch(slots: Self.privateSlot), at: "true", after: "guest_memfd: ",
            "`guest_memfd` in a VM without private memory")
        expectOne(
            protected("punch_private: ram", slot: Sketch().slots), at: "ram", after: "punch_private: ",
            "no slot with private memory shows 0x10000", hint: "give the slot `guest_memfd: true`")
        expectOne(
            Sketch(top: "architecture: riscv-sv48x4", vm: "  type: sw_protected"), at: "sw_protected",
            "`sw_protected` on riscv-sv48x4")
    }
    @Test func `a slot with private memory has no log`() {
        let slot = Self.privateSlot.replacing("}", with: ", flags: [log_dirty_pages]}")
        #expect(
            errors(protected("set_private: ram", slot: slot).text).map(\.message) == [
                "flags of a slot with `guest_memfd`"
            ])
    }
    @Test(arguments: ["set_private: ram+8", "{set_shared: ram, length: 100}", "{punch_private: ram, length: 0}"])
    func `parts of pages`(_ step: String) {
        #expect(errors(protected(step).text).count == 1)
    }
    @Test func `a length goes to the end of the slot, where there is one`() {
        #expect(errors(protected("set_private: 0x100000").text).map(\.message) == ["0x100000 is in no slot"])
        #expect(errors(protected("{set_private: 0x100000, length: 4 KiB}").text).isEmpty)
    }

    // MARK: KVM's own

    @Test func `caches are KVM's, and fetching is the worker's`() throws {
        let plan = try plan(
            Sketch(
                vm: "  async_faults: true",
                phases: "  - kvm: [{cache_write: ram+8, value: 7}, {cache_read: ram+8, expect: 7}]\n"
                    + "    async_worker: [async_fetch]\n    vcpu0: [{prefault: ram, expect: 0}]"))
        #expect(plan.asyncFaults)
        #expect(plan.phases[0].tasks.map(\.actor) == [.background(.kvm), .background(.asyncWorker), .virtualCPU(0)])
        #expect(
            actions(plan) == [
                .cacheStore(at: GuestAddress(0x10008), value: 7), .cacheLoad(at: GuestAddress(0x10008)), .fetchPage,
                .preFault(at: GuestAddress(0x10000), size: 65536),
            ])
    }
    @Test(arguments: [("cache_write: ram", "kvm"), ("cache_read: ram", "kvm"), ("async_fetch", "async_worker")])
    func `elsewhere they are not`(_ step: String, _ task: String) {
        let word = step.split(separator: ":")[0]
        expectOne(
            Sketch(phases: "  - host:\n      - \(step)"), at: step, after: "- ", "`\(word)` outside of `\(task):`",
            hint: "put it under `\(task):`")
    }
}
