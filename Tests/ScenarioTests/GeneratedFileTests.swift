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
    private func isOfTheLog(_ key: Key) -> Bool { ConsumerBuilder.words.contains(key.name) }
    @Test func `examples of steps are steps`() {
        for place in [Place.guestStep, .hostStep] {
            for key in Vocabulary.actions(of: place) {
                let actor = place == .guestStep ? "vcpu0" : isOfTheLog(key) ? "vmm" : "host"
                let text = """
                    name: example
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
                      slots:
                        - {slot: 0, guest_phys_addr: 0x10000000, userspace_addr: ram, flags: [log_dirty_pages]}
                        - {slot: 1, guest_phys_addr: 0x30000000, userspace_addr: blob}
                    phases:
                      - host: [fork, delete_memory_region: 1]
                      - host: [{set_memory_region: {slot: 1, guest_phys_addr: 0x30000000, userspace_addr: blob}}]
                      - vmm: [snapshot: full]
                      - \(actor): [\(key.example)]
                    """
                let found = errors(text)
                let isTaken = key.name == "set_memory_region"
                #expect(found.isEmpty || isTaken, "\(key.name): \(found)")
            }
        }
    }
}
