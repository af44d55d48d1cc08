import Testing

@testable import Scenario

/// What is generated from the vocabulary, and committed, is what the vocabulary says today.
@Suite struct GeneratedFiles {
    @Test func `the schema is up to date`() throws {
        #expect(
            try text(of: "Scenarios/scenario.schema.json") == jsonSchema(),
            "run `faultline schema > Scenarios/scenario.schema.json`")
    }
    @Test func `the reference page is up to date`() throws {
        #expect(
            try text(of: "Documentation/ScenarioReference.md") == referencePage(),
            "run `faultline schema --reference > Documentation/ScenarioReference.md`")
    }
    @Test func `every key is on the reference page and in the schema`() {
        let (page, schema) = (referencePage(), jsonSchema())
        for key in Vocabulary.keys {
            #expect(page.contains("`\(key.shownName)`") || page.contains("`{\(key.name): "), "\(key.name)")
            #expect(schema.contains("\"\(key.name)\"") || schema.contains("\"^\(key.name)("), "\(key.name)")
        }
    }
    @Test func `no key stands twice in one place`() {
        var seen: Set<String> = []
        for key in Vocabulary.keys { #expect(seen.insert("\(key.place) \(key.name)").inserted, "\(key.name)") }
    }
    @Test func `every parameter of an action exists`() {
        for key in Vocabulary.keys {
            for name in key.step?.parameters ?? [] {
                #expect(Vocabulary.parameter(name, of: key.place) != nil, "\(key.name): \(name)")
            }
        }
    }
    private func actor(of key: Key) -> String {
        if key.place == .guestStep { return "vcpu0" }
        if ConsumerBuilder.words.contains(key.name) { return "vmm" }
        if key.name.hasPrefix("cache_") { return "kvm" }
        return key.name == "async_fetch" ? "async_worker" : "host"
    }
    /// A VM with rings has no bitmaps, one with private memory is x86's.
    private func features(for key: Key) -> (vm: String, slot: String) {
        if key.name.contains("ring") { return ("dirty_ring: 64 KiB", "") }
        return key.name.contains("private") || key.name == "set_shared"
            ? ("type: sw_protected", ", guest_memfd: true") : ("vcpus: 1", "")
    }
    @Test func `examples of steps are steps`() {
        for place in [Place.guestStep, .hostStep] {
            for key in Vocabulary.actions(of: place) {
                let actor = actor(of: key)
                let features = features(for: key)
                let text = """
                    name: example
                    architecture: \(PhaseBuilder.tableWords.contains(key.name) ? "x86-shadow" : "x86-tdp")
                    host:
                      device_memory: 1 MiB
                      swap: 4 MiB
                      hugetlb_2m: 2
                      regions:
                        - {name: ram, kind: memfd, size: 1 MiB}
                        - {name: data, kind: file, size: 64 KiB}
                        - {name: shared, kind: memfd, size: 64 KiB}
                        - {name: blob, kind: graphics_buffer, size: 64 KiB}
                        - {name: bar, kind: device_bar, size: 64 KiB}
                        - {name: dax, kind: dax_file, size: 64 KiB}
                        - {name: huge, kind: hugetlb, size: 2 MiB}
                        - {name: window, kind: blob_window, size: 1 MiB}
                    vm:
                      \(features.vm)
                      slots:
                        - {slot: 0, guest_phys_addr: 0x10000000, userspace_addr: ram, flags: [log_dirty_pages]}
                        - {slot: 1, guest_phys_addr: 0x30000000, userspace_addr: blob}
                        - {slot: 2, guest_phys_addr: 0x40000000, userspace_addr: shared\(features.slot)}
                    phases:
                      - host: [fork, delete_memory_region: 1]
                      - host: [{set_memory_region: {slot: 1, guest_phys_addr: 0x30000000, userspace_addr: blob}}]
                      - vmm: [{snapshot: full, expect: {any_of: [17, ENXIO]}}]
                      - \(actor): [\(key.example)]
                    """
                let found = errors(text)
                let isTaken = key.name == "set_memory_region"
                #expect(found.isEmpty || isTaken, "\(key.name): \(found)")
            }
        }
    }
}
