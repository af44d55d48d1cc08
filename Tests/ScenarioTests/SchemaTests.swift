import Foundation
import Testing
import Yams

@testable import Scenario

/// The schema means what the loader does: every shipped scenario passes it, and what the loader refuses for a key, a
/// type or a missing part, it refuses too.
@Suite struct SchemaAgreesWithTheLoader {
    let schema: SchemaCheck

    init() throws {
        let object = try JSONSerialization.jsonObject(with: Data(jsonSchema().utf8))
        schema = SchemaCheck(root: try #require(object as? [String: Any]))
    }

    private func passes(_ text: String) throws -> Bool {
        schema.accepts(try Yams.load(yaml: text) as Any, schema.root)
    }

    @Test(arguments: shipped)
    func `a shipped scenario passes`(_ name: String) throws {
        #expect(try passes(text(of: "Scenarios/\(name).yaml")))
    }
    @Test func `the sketch passes`() throws { #expect(try passes(Sketch().text)) }

    @Test func `what the loader refuses by its shape, the schema refuses`() throws {
        let wrong = [
            Sketch(top: "colour: red"), Sketch(host: "  memry: 16 MiB"), Sketch(host: "  memory: 64 KB"),
            Sketch(regions: "    - {name: ram, kind: anonymous}"),
            Sketch(regions: "    - {name: ram, kind: vmalloc, size: 64 KiB}"),
            Sketch(top: "architecture: arm64"), Sketch(vm: "  vcpus: 17"), Sketch(vm: "  allow_unsafe_mappings: 1"),
            Sketch(phases: "  - vcpu0:\n      - {read: ram, value: 7}"),
            Sketch(phases: "  - vcpu0:\n      - {read: ram, write: ram}"),
            Sketch(phases: "  - vcpu0:\n      - munmap: ram"), Sketch(phases: "  - vcpu01:\n      - read: ram"),
            Sketch(phases: "  - vcpu0:\n      - {write: ram, expect: 7}"),
            Sketch(phases: "  - vcpu0:\n      - {write: ram, expect: {any_of: [ok]}}"),
            Sketch(phases: "  - vcpu0:\n      - {write: ram, expect: {any_of: [ok, 7]}}"),
            Sketch(phases: "  - vcpu0:\n      - {write: ram, expect: {any_of: [ok, anything]}}"),
            Sketch(phases: "  - host:\n      - {get_dirty_log: 0, expect: {page: [1]}}"),
            Sketch(top: "known: {guess: [J-5]}"), Sketch(top: "known: {precise: [I-5]}"),
            Sketch(top: "expect: {statistics: {pf_fixd: 3}}"),
        ]
        for sketch in wrong {
            #expect(!errors(sketch.text).isEmpty, "the loader takes\n\(sketch.text)")
            #expect(try !passes(sketch.text), "the schema takes\n\(sketch.text)")
        }
    }
}

/// As much of JSON Schema as the generated one uses.
struct SchemaCheck {
    let root: [String: Any]

    func accepts(_ value: Any, _ schema: [String: Any]) -> Bool {
        if let reference = schema["$ref"] as? String {
            let definitions = root["$defs"] as? [String: Any]
            let name = String(reference.split(separator: "/").last ?? "")
            guard let target = definitions?[name] as? [String: Any], accepts(value, target) else { return false }
        }
        if let choices = schema["oneOf"] as? [[String: Any]], choices.count(where: { accepts(value, $0) }) != 1 {
            return false
        }
        if let values = schema["enum"] as? [String], !values.contains(value as? String ?? "") { return false }
        if let type = schema["type"] {
            let names = type as? [String] ?? [type as? String ?? ""]
            guard names.contains(where: { isType(value, $0) }) else { return false }
        }
        return acceptsNumber(value, schema) && acceptsText(value, schema) && acceptsList(value, schema)
            && acceptsObject(value, schema)
    }

    private func isType(_ value: Any, _ name: String) -> Bool {
        switch name {
        case "object": value is [AnyHashable: Any]
        case "array": value is [Any]
        case "string": value is String
        case "boolean": value is Bool
        case "integer": value is Int || value is UInt
        case "number": value is Int || value is UInt || value is Double
        case "null": value is NSNull
        default: false
        }
    }

    private func acceptsNumber(_ value: Any, _ schema: [String: Any]) -> Bool {
        guard let number = value as? Int else { return true }
        if let minimum = schema["minimum"] as? Int, number < minimum { return false }
        if let maximum = schema["maximum"] as? Int, number > maximum { return false }
        return true
    }

    private func acceptsText(_ value: Any, _ schema: [String: Any]) -> Bool {
        guard let text = value as? String, let pattern = schema["pattern"] as? String else { return true }
        return text.range(of: pattern, options: .regularExpression) != nil
    }

    private func acceptsList(_ value: Any, _ schema: [String: Any]) -> Bool {
        guard let list = value as? [Any], let items = schema["items"] as? [String: Any] else { return true }
        return list.count >= schema["minItems"] as? Int ?? 0 && list.allSatisfy { accepts($0, items) }
    }

    private func acceptsObject(_ value: Any, _ schema: [String: Any]) -> Bool {
        guard let object = value as? [AnyHashable: Any] else { return true }
        let properties = schema["properties"] as? [String: Any] ?? [:]
        let patterns = schema["patternProperties"] as? [String: Any] ?? [:]
        for (key, member) in object {
            let name = key.base as? String ?? ""
            let pattern = patterns.first { name.range(of: $0.key, options: .regularExpression) != nil }
            guard let known = (properties[name] ?? pattern?.value) as? [String: Any] else {
                if schema["additionalProperties"] as? Bool == false { return false }
                continue
            }
            if !accepts(member, known) { return false }
        }
        return (schema["required"] as? [String] ?? []).allSatisfy { object[AnyHashable($0)] != nil }
    }
}
