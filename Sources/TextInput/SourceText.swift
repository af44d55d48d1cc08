#if canImport(Glibc)
    import Glibc
#elseif canImport(Musl)
    import Musl
#elseif canImport(Darwin)
    import Darwin
#endif

/// A text's bytes, known to be plain text: UTF-8, Unix line ends, no control characters, bounded in size.
package struct SourceText {
    /// What the text is, as messages call it.
    package struct Kind: Sendable {
        package var name: String
        /// What a file of it is called, with its usual suffix.
        package var file: String
        package var readsStandardInput: Bool
        package static let scenario = Kind(
            name: "a scenario", file: "a scenario (a .yaml file)", readsStandardInput: false)
        package static let ioctlScript = Kind(
            name: "an ioctl script", file: "an ioctl script, or - for standard input", readsStandardInput: true)
    }

    /// 1 MiB. A text of a person has some hundred lines.
    package static let largest = 1 << 20

    package let file: String
    package let text: String
    package let lines: [String]

    package init(_ kind: Kind, file: String, bytes: [UInt8]) throws(InputErrors) {
        func refuse(at offset: Int, _ message: String, _ hint: String) -> InputErrors {
            let before = bytes[..<offset]
            let line = before.count { $0 == 0x0a } + 1
            let lineStart = before.lastIndex(of: 0x0a).map { $0 + 1 } ?? 0
            // Characters, not bytes: continuation bytes don't count.
            let column = bytes[lineStart..<offset].count { $0 & 0xc0 != 0x80 } + 1
            return InputErrors(errors: [
                InputError(file: file, line: line, column: column, message: message, hint: hint, excerpt: "")
            ])
        }
        guard bytes.count <= SourceText.largest else {
            throw refuse(
                at: 0, "the file is larger than 1 MiB", "\(kind.name) is a short text; is this the right file?")
        }
        guard !bytes.starts(with: [0xef, 0xbb, 0xbf]) else {
            throw refuse(at: 0, "the file starts with a byte order mark", "save it as UTF-8 without one")
        }
        if let offset = bytes.firstIndex(of: 0x0d) {
            throw refuse(at: offset, "a carriage return", "save the file with Unix line ends (LF, not CR LF)")
        }
        if let offset = bytes.firstIndex(where: { ($0 < 0x20 && $0 != 0x0a && $0 != 0x09) || $0 == 0x7f }) {
            throw refuse(
                at: offset, "a control character (0x\(String(bytes[offset], radix: 16)))",
                "\(kind.name) is plain text; is this the right file?")
        }
        if let offset = SourceText.firstInvalidUTF8(bytes) {
            throw refuse(at: offset, "bytes that are not UTF-8", "save the file as UTF-8")
        }
        let text = String(decoding: bytes, as: UTF8.self)
        // YAML 1.1 takes these for line ends, and no editor does: lines would be numbered differently.
        if let index = text.unicodeScalars.firstIndex(where: SourceText.isUnusualLineEnd) {
            let offset = text.utf8.distance(from: text.startIndex, to: index)
            throw refuse(at: offset, "an unusual line end (U+0085, U+2028 or U+2029)", "use a newline or a space")
        }
        self.file = file
        self.text = text
        lines = text.split(separator: "\n", omittingEmptySubsequences: false).map(String.init)
    }

    private static func isUnusualLineEnd(_ scalar: Unicode.Scalar) -> Bool {
        (0x80...0x9f).contains(scalar.value) || scalar.value == 0x2028 || scalar.value == 0x2029
            || scalar.value == 0xfeff
    }

    private static func firstInvalidUTF8(_ bytes: [UInt8]) -> Int? {
        var decoder = UTF8()
        var rest = bytes.makeIterator()
        var offset = 0
        while true {
            switch decoder.decode(&rest) {
            case .scalarValue(let scalar): offset += UTF8.width(scalar)
            case .emptyInput: return nil
            case .error: return offset
            }
        }
    }

    /// The file's leading comment without its `#`, and without lines meant for editors.
    package var story: String {
        var story: [Substring] = []
        for line in lines {
            guard line.first == "#" else { break }
            let words = line.dropFirst().drop { $0 == " " }
            if words.hasPrefix("yaml-language-server:") { continue }
            story.append(words)
        }
        while story.last?.isEmpty == true { story.removeLast() }
        return story.joined(separator: "\n")
    }
}

/// The file's bytes; reading stops past the largest size, so an endless file is refused like a large one.
package func readBytes(of kind: SourceText.Kind, file path: String) throws(InputErrors) -> [UInt8] {
    func failure() -> InputErrors {
        let reason = String(cString: strerror(errno))
        return InputErrors(errors: [
            InputError(
                file: path, line: 1, column: 1, message: "the file can't be read: \(reason)",
                hint: "give the path of \(kind.file)", excerpt: "")
        ])
    }
    let isStandardInput = path == "-" && kind.readsStandardInput
    let descriptor = isStandardInput ? STDIN_FILENO : open(path, O_RDONLY | O_CLOEXEC)
    guard descriptor >= 0 else { throw failure() }
    defer { if !isStandardInput { _ = close(descriptor) } }
    var bytes: [UInt8] = []
    var chunk = [UInt8](repeating: 0, count: 1 << 16)
    while bytes.count <= SourceText.largest {
        let count = read(descriptor, &chunk, chunk.count)
        if count < 0 && errno == EINTR { continue }
        guard count >= 0 else { throw failure() }
        if count == 0 { break }
        bytes += chunk[..<count]
    }
    return bytes
}
