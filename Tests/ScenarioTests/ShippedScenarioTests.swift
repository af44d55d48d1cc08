import Frames
import Machine
import Testing

@testable import Scenario

/// The scenarios in `Scenarios/`: they load, tell their story, and run on every architecture.
@Suite struct ShippedScenarios {
    @Test(arguments: shipped)
    func `it loads, under the name of its file`(_ name: String) throws {
        let file = try load(shipped: name)
        #expect(String(decoding: file.plan.name, as: UTF8.self) == name)
        #expect(file.plan.phases.allSatisfy { phase in phase.tasks.allSatisfy { !$0.steps.isEmpty } })
    }
    @Test(arguments: shipped)
    func `it opens with its story`(_ name: String) throws {
        let lines = try load(shipped: name).story.split(separator: "\n", omittingEmptySubsequences: false)
        #expect((5...10).contains(lines.count), "\(lines.count) lines")
        #expect(!lines.contains { $0.contains("yaml-language-server") })
    }
    @Test(arguments: shipped)
    func `its addresses exist on every architecture`(_ name: String) throws {
        let file = try load(shipped: name)
        let expected: [Architecture] =
            shippedForX86.contains(name)
            ? [.x86TDP] : file.plan.changesGuestTables ? [.x86Shadow] : Architecture.allCases
        #expect(file.architectures == expected)
        #expect(file.plan.architecture == (shippedForShadow.contains(name) ? .x86Shadow : .x86TDP))
    }
    @Test(arguments: shipped)
    func `its plan survives being bytes`(_ name: String) throws {
        let plan = try load(shipped: name).plan
        #expect(try Plan(decoding: plan.encoded()) == plan)
    }
    @Test(arguments: shipped)
    func `editors find the schema`(_ name: String) throws {
        let text = try text(of: "Scenarios/\(name).yaml")
        #expect(text.contains("\n# yaml-language-server: $schema=scenario.schema.json\n"))
    }
}

/// What a file says is what the plan has.
@Suite struct PlansSayWhatTheFileSays {
    @Test func `virtio-gpu-blob`() throws {
        let file = try load(shipped: "virtio-gpu-blob")
        let plan = file.plan
        #expect(plan.ramFrames == 4096)
        #expect(plan.deviceFrames == 256)
        #expect(plan.regions.map(\.kind) == [.anonymous, .graphicsBuffer])
        #expect(plan.regions[1].order == 2)
        #expect(plan.regions[1].size == 65536)
        #expect(plan.slots.map(\.guestAddress) == [GuestAddress(0), GuestAddress(0x1_0000_0000)])
        #expect(plan.slots.map(\.size) == [2 << 20, 65536])
        let first = plan.phases[0].tasks[0]
        #expect(first.actor == .virtualCPU(0))
        #expect(
            first.steps.map(\.action) == [
                .guest(.write, at: GuestAddress(0x1_0000_0000), count: 16, stride: 4096, value: 0xb10b_0000),
                .guest(.read, at: GuestAddress(0x1_0000_0000), count: 16, stride: 4096, value: 0),
            ])
        #expect(first.steps.map(\.expectation) == [.success, .counting(from: 0xb10b_0000)])
        #expect(plan.phases.last?.tasks.last?.steps.last?.expectation == .error(.EFAULT))
        #expect(first.steps[0].line == 33)
    }
    @Test func `the more exact name of an architecture goes first`() throws {
        let file = try load(shipped: "virtio-gpu-blob")
        #expect(file.known(.precise, on: .x86TDP) == nil)
        #expect(file.known(.guess, on: .riscvSv48x4)?.invariants == [.i4, .i5])
        #expect(file.known(.guess, on: .x86TDP)?.unmetExpectation == true)
        #expect(file.known(.tracked, on: .x86TDP)?.unmetExpectation == false)
        #expect(file.known(.tracked, on: .riscvSv39x4)?.unmetExpectation == true)
    }
    @Test func `answers by architecture`() throws {
        let plan = try load(shipped: "pfnmap-write-upgrade").plan
        let step = plan.phases[0].tasks[0].steps[1]
        #expect(step.expectation(on: .x86TDP) == .success)
        #expect(step.expectation(on: .riscvSv39x4) == .error(.EFAULT))
        #expect(step.expectation(on: .riscvSv48x4) == .error(.EFAULT))
        #expect(step.exceptions == [ArchitectureExpectation(.riscv, .error(.EFAULT))])
        #expect(plan.expectations.map(\.architectures) == [.x86])
    }
    @Test func `tasks stand in the order written`() throws {
        let plan = try load(shipped: "buffer-eviction-while-mapped").plan
        #expect(plan.phases[1].tasks.map(\.actor) == [.virtualCPU(0), .host, .virtualCPU(1)])
    }
    @Test func `a step's defaults`() throws {
        let text = Sketch(phases: "  - vcpu0: [write: ram]\n    host: [get_guest_page: ram, munmap: ram+0x1000, fork]")
            .text
        let plan = try loadScenario(text: text, file: "test.yaml").plan
        #expect(
            plan.phases[0].tasks.flatMap(\.steps).map(\.action) == [
                .guest(.write, at: GuestAddress(0x10000), count: 1, stride: 4096, value: 1),
                .getGuestPage(at: GuestAddress(0x10000), write: true),
                .munmap(region: 0, offset: 0x1000, length: 0xf000),
                .fork,
            ])
        #expect(plan.phases[0].name == Array("phase 1".utf8))
    }
    @Test func `the whole list of host steps`() throws {
        let text = """
            name: all
            host:
              device_memory: 1 MiB
              regions:
                - {name: ram, kind: memfd, size: 512 KiB}
                - {name: blob, kind: graphics_buffer, size: 64 KiB, order: 1, protection: read}
                - {name: bar, kind: device_bar, size: 8 KiB, protection: none}
                - {name: dax, kind: dax_file, size: 8 KiB}
                - {name: buf, kind: udmabuf, size: 8 KiB, source: ram}
                - {name: window, kind: blob_window, size: 1 MiB}
            vm:
              vcpus: 2
              allow_unsafe_mappings: true
              slots: [{slot: 3, guest_phys_addr: 0, userspace_addr: ram, flags: [log_dirty_pages, readonly]}]
            phases:
              - host:
                  - {store: ram+8, value: 0x10}
                  - {load: ram+8, expect: 0x10}
                  - {mprotect: ram, length: 4 KiB, protection: none}
                  - {madvise: ram+4 KiB, advice: dontneed, length: 0x1000}
                  - fork
                  - {child_store: ram, value: 2}
                  - child_load: ram
                  - child_exit
                  - {age: ram, length: 8 KiB}
                  - {move: blob, to: device_memory}
                  - {move: blob, to: system}
                  - evict: blob
                  - free: blob
                  - {driver_store: bar+8, value: 3}
                  - {driver_load: bar+8, expect: 3}
                  - disable: bar
                  - reset: bar
                  - {truncate: ram, size: 4 KiB, expect: EPERM}
                  - {punch_hole: ram+4 KiB, length: 8 KiB}
                  - fsync: dax
                  - {map_blob: window+64 KiB, resource: ram}
                  - unmap_blob: window+64 KiB
                  - {set_memory_region: {slot: 4, guest_phys_addr: 1048576, userspace_addr: blob+4 KiB, memory_size: 8 KiB}}
                  - delete_memory_region: 4
                  - {get_dirty_log: 3, expect: {pages: []}}
                  - {clear_dirty_log: 3, first_page: 64}
                  - enable_manual_protect
                  - enable_manual_protect: initially_set
                  - {map_guest_page: ram, access: read}
                  - get_guest_page: 0x1000
            """
        let plan = try loadScenario(text: text, file: "test.yaml").plan
        var slot = SlotPlan()
        slot.id = 4
        slot.guestAddress = GuestAddress(0x10_0000)
        slot.region = 1
        slot.offset = 4096
        slot.size = 8192
        #expect(
            plan.phases[0].tasks[0].steps.map(\.action) == [
                .store(region: 0, offset: 8, value: 0x10), .load(region: 0, offset: 8),
                .mprotect(region: 0, offset: 0, length: 4096, read: false, write: false),
                .madviseDontNeed(region: 0, offset: 4096, length: 4096), .fork,
                .childStore(region: 0, offset: 0, value: 2), .childLoad(region: 0, offset: 0), .childExit,
                .age(region: 0, offset: 0, length: 8192), .moveBuffer(region: 1, toDeviceMemory: true),
                .moveBuffer(region: 1, toDeviceMemory: false), .evictBuffer(region: 1), .freeBuffer(region: 1),
                .driverStore(region: 2, offset: 8, value: 3), .driverLoad(region: 2, offset: 8),
                .disableDevice(region: 2), .resetDevice(region: 2), .truncate(region: 0, size: 4096),
                .punchHole(region: 0, offset: 4096, length: 8192), .writeBack(region: 3),
                .mapBlob(window: 5, offset: 65536, resource: 0), .unmapBlob(window: 5, offset: 65536),
                .setMemoryRegion(slot), .deleteMemoryRegion(id: 4),
                .getDirtyLog(id: 3), .clearDirtyLog(id: 3, firstPage: 64, pages: 64),
                .enableManualProtect(initiallySet: false), .enableManualProtect(initiallySet: true),
                .mapGuestPage(at: GuestAddress(0), write: false), .getGuestPage(at: GuestAddress(4096), write: true),
            ])
        #expect(plan.slots[0].logDirtyPages && plan.slots[0].readOnly)
        #expect(plan.regions.map(\.write) == [true, false, false, true, true, true])
        #expect(plan.regions.map(\.read) == [true, true, false, true, true, true])
        #expect(plan.regions.map(\.source) == [nil, nil, nil, nil, 0, nil])
        #expect(plan.virtualCPUs == 2 && plan.allowUnsafeMappings)
    }
}
