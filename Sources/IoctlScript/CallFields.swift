import TextInput

/// A word of a line, and where it begins.
struct Token {
    var text: String
    var column: Int
}

/// The parts of one call: `word word key=value key=value`. What is read is marked; what nobody asks for is a mistake.
///
/// Each reader returns some value even if it complains: a script with a complaint never runs.
struct CallFields {
    let call: Token
    private(set) var words: [Token]
    private let pairs: [(key: Token, value: Token)]
    private var isUsed: [Bool]
    /// Keys that the call knows, in the order asked for.
    private var known: [String] = []
    private let line: Int
    private let complaints: Complaints

    /// Nil: nothing but a comment. Complains about what is no word.
    init?(_ text: String, line: Int, _ complaints: Complaints) {
        var tokens = Self.tokens(text)
        guard !tokens.isEmpty else { return nil }
        call = tokens.removeFirst()
        self.line = line
        self.complaints = complaints
        var words: [Token] = []
        var pairs: [(key: Token, value: Token)] = []
        for token in tokens {
            guard let equals = token.text.firstIndex(of: "=") else {
                words.append(token)
                continue
            }
            let key = Token(text: String(token.text[..<equals]), column: token.column)
            let value = Token(
                text: String(token.text[token.text.index(after: equals)...]),
                column: token.column + key.text.unicodeScalars.count + 1)
            if pairs.contains(where: { $0.key.text == key.text }) {
                complaints.add(Position(line: line, column: key.column), "\(key.text) is given twice", "give it once")
                continue
            }
            pairs.append((key, value))
        }
        self.words = words
        self.pairs = pairs
        isUsed = Array(repeating: false, count: pairs.count)
    }

    /// Words between spaces and tabs, up to a `#` that begins one.
    private static func tokens(_ text: String) -> [Token] {
        var tokens: [Token] = []
        var current = ""
        var column = 0
        var start = 0
        for scalar in text.unicodeScalars {
            column += 1
            if scalar == " " || scalar == "\t" {
                if !current.isEmpty { tokens.append(Token(text: current, column: start)) }
                current = ""
                continue
            }
            if current.isEmpty {
                if scalar == "#" { return tokens }
                start = column
            }
            current.unicodeScalars.append(scalar)
        }
        if !current.isEmpty { tokens.append(Token(text: current, column: start)) }
        return tokens
    }

    // MARK: What is wrong

    func complain(_ token: Token, _ message: String, _ hint: String) {
        complaints.add(Position(line: line, column: token.column), message, hint)
    }

    /// Complains about every word and key that was not read.
    mutating func finish() {
        for word in words {
            complain(word, "\(Self.shown(word.text)) means nothing here", "after the call come keys: \(keyList)")
        }
        for (index, pair) in pairs.enumerated() where !isUsed[index] {
            let guess = nearest(pair.key.text, in: known).map { "did you mean \($0)?" }
            complain(
                pair.key, "\(call.text) has no key \(Self.shown(pair.key.text))", guess ?? "its keys are: \(keyList)")
        }
    }

    private var keyList: String { known.isEmpty ? "none" : known.joined(separator: ", ") }

    /// Quoted, and not longer than a line.
    static func shown(_ text: String) -> String {
        text.count <= 40 ? "\"\(text)\"" : "\"\(text.prefix(37))...\""
    }

    // MARK: Reading

    /// The first bare word, if there is one.
    mutating func takeWord() -> Token? { words.isEmpty ? nil : words.removeFirst() }

    mutating func optional(_ key: String) -> Token? {
        if !known.contains(key) { known.append(key) }
        guard let index = pairs.firstIndex(where: { $0.key.text == key }) else { return nil }
        isUsed[index] = true
        return pairs[index].value
    }

    func has(_ key: String) -> Bool { pairs.contains { $0.key.text == key } }

    mutating func required(_ key: String, _ example: String) -> Token? {
        if let token = optional(key) { return token }
        complain(call, "\(call.text) needs \(key)", "for example \(key)=\(example)")
        return nil
    }

    /// A number of at most `most`; nil `or`: it must be there.
    mutating func number(_ key: String, or missing: UInt64? = nil, most: UInt64 = .max) -> UInt64 {
        guard let token = missing == nil ? required(key, "0x1000") : optional(key) else { return missing ?? 0 }
        return number(token, most: most)
    }

    func number(_ token: Token, most: UInt64 = .max) -> UInt64 {
        guard let value = ScriptNumber.parse(token.text) else {
            complain(
                token, "\(Self.shown(token.text)) is no number",
                "write 4096, 0x1000, 1_000_000, 64k, 2M or 1G, below 2^64")
            return 0
        }
        if value > most { complain(token, "\(token.text) is too large", "at most \(hexText(most))") }
        return value
    }

    /// One of some words, or nil if it is none of them: then it has complained.
    mutating func choice<T>(_ key: String, _ choices: [(String, T)], or missing: T?) -> T? {
        guard let token = missing == nil ? required(key, choices[0].0) : optional(key) else { return missing }
        if let found = choices.first(where: { $0.0 == token.text }) { return found.1 }
        let names = choices.map(\.0)
        let guess = nearest(token.text, in: names).map { "did you mean \($0)?" }
        complain(
            token, "\(key) can't be \(Self.shown(token.text))", guess ?? "one of: \(names.joined(separator: ", "))")
        return nil
    }

    mutating func isYes(_ key: String) -> Bool { choice(key, [("yes", true), ("no", false)], or: false) ?? false }

    /// Words and numbers with `|` between them.
    mutating func bits(_ key: String, _ words: [(String, UInt64)], or missing: UInt64?, most: UInt64 = .max) -> UInt64 {
        guard let token = missing == nil ? required(key, words[0].0) : optional(key) else { return missing ?? 0 }
        var result: UInt64 = 0
        var column = token.column
        for part in token.text.split(separator: "|", omittingEmptySubsequences: false) {
            let text = String(part)
            if let word = words.first(where: { $0.0 == text }) {
                result |= word.1
            } else if let value = ScriptNumber.parse(text) {
                if value > most {
                    complain(Token(text: text, column: column), "\(text) is too large", "at most \(hexText(most))")
                }
                result |= value
            } else {
                let names = words.map(\.0)
                let guess = nearest(text, in: names).map { "did you mean \($0)?" }
                complain(
                    Token(text: text, column: column), "\(key) has no \(Self.shown(text))",
                    guess ?? "numbers, or: \(names.joined(separator: ", ")), with | between them")
            }
            column += text.unicodeScalars.count + 1
        }
        return result
    }

    /// Numbers with commas between them; `VALUE*N` is N times the same, as answers are printed.
    func list(_ token: Token, most: Int) -> [UInt64] {
        var values: [UInt64] = []
        var column = token.column
        for part in token.text.split(separator: ",", omittingEmptySubsequences: false) {
            let pieces = part.split(separator: "*", maxSplits: 1, omittingEmptySubsequences: false).map(String.init)
            let value = number(Token(text: pieces[0], column: column))
            var count: UInt64 = 1
            if pieces.count == 2 {
                let place = Token(text: pieces[1], column: column + pieces[0].unicodeScalars.count + 1)
                count = number(place, most: UInt64(most))
            }
            guard values.count + Int(clamping: count) <= most else {
                complain(token, "more than \(most) numbers", "give fewer")
                return values
            }
            values += Array(repeating: value, count: Int(count))
            column += part.unicodeScalars.count + 1
        }
        return values
    }
}

/// Numbers as scripts write them.
enum ScriptNumber {
    private static let units: [(Character, UInt64)] = [("k", 1 << 10), ("M", 1 << 20), ("G", 1 << 30)]

    /// `4096`, `0x1000`, `1_000_000`, `64k`, `2M`, `1G`. Nil for anything else, and from 2^64 on.
    static func parse(_ text: String) -> UInt64? {
        if text.hasPrefix("0x") { return digits(text.dropFirst(2), radix: 16) }
        guard let last = text.last, let unit = units.first(where: { $0.0 == last }) else {
            return digits(text[...], radix: 10)
        }
        guard let count = digits(text.dropLast(), radix: 10) else { return nil }
        let (bytes, overflow) = count.multipliedReportingOverflow(by: unit.1)
        return overflow ? nil : bytes
    }

    private static func digits(_ text: Substring, radix: Int) -> UInt64? {
        let groups = text.split(separator: "_", omittingEmptySubsequences: false)
        guard groups.allSatisfy({ !$0.isEmpty }) else { return nil }
        let joined = groups.joined()
        // No sign, no digits of other scripts.
        guard joined.utf8.allSatisfy({ (0x30...0x39).contains($0) || radix == 16 && isHexLetter($0) }) else {
            return nil
        }
        return UInt64(joined, radix: radix)
    }

    private static func isHexLetter(_ byte: UInt8) -> Bool {
        (0x41...0x46).contains(byte) || (0x61...0x66).contains(byte)
    }
}
