import FoundationEssentials

/// A report as JSON, with a line break at the end. Sorted keys, so that two processes print the same bytes.
package func jsonText(_ value: some Encodable) -> String {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
    guard let data = try? encoder.encode(value) else { preconditionFailure("plain data can't fail to encode") }
    return String(decoding: data, as: UTF8.self) + "\n"
}
