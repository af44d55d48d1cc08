import TextInput

extension Script {
    /// Reads a script from text; `file` is what messages call it.
    public init(text: String, file: String) throws(InputErrors) { try self.init(bytes: Array(text.utf8), file: file) }

    /// Reads a script from a file; `-` is standard input.
    public init(path: String) throws(InputErrors) {
        let file = path == "-" ? "standard input" : path
        try self.init(bytes: try readBytes(of: .ioctlScript, file: path), file: file)
    }

    public init(bytes: [UInt8], file: String) throws(InputErrors) {
        let source = try SourceText(.ioctlScript, file: file, bytes: bytes)
        let complaints = Complaints(file: file, lines: source.lines)
        var reader = ScriptReader(complaints)
        for (index, text) in source.lines.enumerated() { reader.read(text, line: index + 1) }
        try complaints.throwIfAny()
        self.init(lines: reader.lines, names: reader.names)
    }
}

/// Lines to steps. Names are resolved as they come: what a line names, an earlier line has made.
struct ScriptReader {
    /// The version of the language that this reads.
    static let version = 1
    /// More than these no script of sense makes.
    static let mostOfAKind = 256
    static let largestHostRegion: UInt64 = 1 << 30
    static let mostAccesses: UInt64 = 1 << 20
    static let mostWords = 1 << 16

    let complaints: Complaints
    var lines: [Script.Line] = []
    var names = Names()
    private var ended: Set<Int> = []
    private var kinds: [HostKind] = []
    private var sizes: [UInt64] = []

    init(_ complaints: Complaints) { self.complaints = complaints }

    mutating func read(_ text: String, line: Int) {
        if line == 1, !checkVersion(text) { return }
        guard var fields = CallFields(text, line: line, complaints) else { return }
        guard let call = Self.calls.first(where: { $0.0 == fields.call.text }) else {
            let names = Self.calls.map(\.0)
            let guess = nearest(fields.call.text, in: names).map { "did you mean \($0)?" }
            return fields.complain(
                fields.call, "there is no call \(CallFields.shown(fields.call.text))",
                guess ?? "the calls are: \(names.joined(separator: ", "))")
        }
        // After a mistake not every key has been asked for.
        guard let step = call.1(&self, &fields) else { return }
        let process = caller(&fields)
        fields.finish()
        if case .exit = step { end(process, fields) }
        lines.append(Script.Line(number: line, process: process, step))
    }

    /// `# faultline ioctl 1`: another version is refused.
    private func checkVersion(_ text: String) -> Bool {
        let words = text.split(whereSeparator: { $0 == " " || $0 == "\t" })
        guard words.count >= 4, words[0] == "#", words[1] == "faultline", words[2] == "ioctl" else { return true }
        if words[3] == "\(Self.version)" { return true }
        let column = text.distance(from: text.startIndex, to: words[3].startIndex) + 1
        complaints.add(
            Position(line: 1, column: column), "version \(words[3]) of the language", "this program reads version 1")
        return false
    }

    // MARK: Names

    private mutating func caller(_ fields: inout CallFields) -> Int {
        guard let token = fields.optional("as") else { return 0 }
        guard let index = names.processes.firstIndex(of: token.text) else {
            fields.complain(
                token, "there is no process \(CallFields.shown(token.text)) yet",
                "an earlier line must make it: process name=\(token.text)")
            return 0
        }
        if ended.contains(index) {
            fields.complain(token, "the process \(token.text) has ended", "take one that still runs")
        }
        return index
    }

    private mutating func end(_ process: Int, _ fields: CallFields) {
        if process == 0 {
            fields.complain(
                fields.call, "the script's own process can't end", "say which: exit as=NAME, of a process line")
        }
        ended.insert(process)
    }

    /// The number of a new thing of this name.
    private mutating func new(
        _ fields: inout CallFields, _ list: WritableKeyPath<Names, [String]>, _ what: String, or missing: String? = nil
    ) -> Int? {
        let given = missing == nil ? fields.required("name", "x") : fields.optional("name")
        guard let token = given ?? missing.map({ Token(text: $0, column: fields.call.column) }) else { return nil }
        guard Self.isName(token.text), !Self.reserved.contains(token.text) else {
            fields.complain(
                token, "\(CallFields.shown(token.text)) is no name",
                "a letter, then letters, digits, - or _, 64 at most; not \(Self.reserved.joined(separator: ", "))")
            return nil
        }
        if names[keyPath: list].contains(token.text) {
            fields.complain(token, "there is a \(what) \(token.text) already", "give it another name")
            return nil
        }
        guard names[keyPath: list].count < Self.mostOfAKind else {
            fields.complain(fields.call, "more than \(Self.mostOfAKind) of this kind", "make fewer")
            return nil
        }
        names[keyPath: list].append(token.text)
        return names[keyPath: list].count - 1
    }

    static let reserved = ["null", "kernel", "anonymous", "shared_anonymous"]

    static func isName(_ text: String) -> Bool {
        func isLetter(_ byte: UInt8) -> Bool { (0x41...0x5a).contains(byte) || (0x61...0x7a).contains(byte) }
        guard let first = text.utf8.first, isLetter(first), text.utf8.count <= 64 else { return false }
        return text.utf8.allSatisfy { isLetter($0) || (0x30...0x39).contains($0) || $0 == 0x2d || $0 == 0x5f }
    }

    mutating func newVM(_ fields: inout CallFields) -> Int? {
        let number = new(&fields, \.vms, "VM", or: "vm")
        if number != nil { names.cpus.append([]) }
        return number
    }

    mutating func newRegion(_ fields: inout CallFields, _ kind: HostKind, size: UInt64) -> Int? {
        let number = new(&fields, \.regions, "host region")
        if number != nil {
            kinds.append(kind)
            sizes.append(size)
        }
        return number
    }

    mutating func newMemfd(_ fields: inout CallFields) -> Int? { new(&fields, \.memfds, "guest_memfd") }
    mutating func newProcess(_ fields: inout CallFields) -> Int? { new(&fields, \.processes, "process") }

    /// The number of a vCPU of this identity, new or known.
    mutating func cpu(vm: Int, creating id: UInt64) -> Int {
        if let known = names.cpus[vm].firstIndex(of: id) { return known }
        names.cpus[vm].append(id)
        return names.cpus[vm].count - 1
    }

    /// Something that an earlier line has made.
    private func find(_ token: Token, _ fields: CallFields, _ list: [String], _ what: String, _ call: String) -> Int? {
        if let index = list.firstIndex(of: token.text) { return index }
        let guess = nearest(token.text, in: list).map { "did you mean \($0)?" }
        fields.complain(
            token, "there is no \(what) \(CallFields.shown(token.text)) yet",
            guess ?? "an earlier line must make it: \(call)")
        return nil
    }

    /// The VM that `vm` names; without it the only one so far.
    mutating func vm(_ fields: inout CallFields) -> Int? {
        if let token = fields.optional("vm") { return find(token, fields, names.vms, "VM", "vm name=NAME") }
        if names.vms.count == 1 { return 0 }
        fields.complain(
            fields.call, names.vms.isEmpty ? "there is no VM yet" : "which VM?",
            names.vms.isEmpty ? "an earlier line must make it: vm" : "say vm=\(names.vms[0])")
        return nil
    }

    mutating func region(_ fields: inout CallFields) -> Int? {
        guard let token = fields.required("host", names.regions.first ?? "ram") else { return nil }
        return find(token, fields, names.regions, "host region", "host name=NAME kind=anonymous size=1M")
    }

    /// A region behind which there is an object.
    mutating func object(_ fields: inout CallFields) -> Int? {
        guard let token = fields.required("host", names.regions.first ?? "ram") else { return nil }
        return object(token, fields)
    }

    /// The size that `host` gave it.
    func size(of region: Int) -> UInt64 { sizes[region] }

    func object(_ token: Token, _ fields: CallFields) -> Int? {
        let call = "host name=NAME kind=memfd size=1M"
        guard let region = find(token, fields, names.regions, "host region", call) else { return nil }
        guard kinds[region].hasObject else {
            let kinds = HostKind.allCases.filter(\.hasObject).map(\.rawValue).joined(separator: ", ")
            fields.complain(token, "no file stands behind \(token.text)", "take a region of one of: \(kinds)")
            return nil
        }
        return region
    }

    mutating func memfd(_ fields: inout CallFields) -> Int? {
        guard let token = fields.required("memfd", names.memfds.first ?? "m0") else { return nil }
        return memfd(token, fields)
    }

    func memfd(_ token: Token, _ fields: CallFields) -> Int? {
        find(token, fields, names.memfds, "guest_memfd", "memfd name=NAME size=1M")
    }

    mutating func cpu(_ fields: inout CallFields) -> CPU? {
        guard let vm = vm(&fields), let token = fields.required("cpu", "0") else { return nil }
        return cpu(vm, token, fields)
    }

    func cpu(_ vm: Int, _ token: Token, _ fields: CallFields) -> CPU? {
        let id = fields.number(token)
        if let index = names.cpus[vm].firstIndex(of: id) { return CPU(vm: vm, cpu: index) }
        fields.complain(token, "there is no vCPU \(id) yet", "an earlier line must make it: vcpu id=\(id)")
        return nil
    }

    /// `ram`, `ram+0x1000`, `null`, `kernel+8`.
    func place(_ token: Token, _ fields: CallFields) -> HostPlace? {
        let parts = token.text.split(separator: "+", maxSplits: 1, omittingEmptySubsequences: false).map(String.init)
        var offset: UInt64 = 0
        if parts.count == 2 {
            let column = token.column + parts[0].unicodeScalars.count + 1
            offset = fields.number(Token(text: parts[1], column: column))
        }
        switch parts[0] {
        case "null": return HostPlace(.null, offset)
        case "kernel": return HostPlace(.kernel, offset)
        default:
            let name = Token(text: parts[0], column: token.column)
            let call = "host name=NAME kind=anonymous size=1M"
            return find(name, fields, names.regions, "host region", call).map { HostPlace(.region($0), offset) }
        }
    }
}
