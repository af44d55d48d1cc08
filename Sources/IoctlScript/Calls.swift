import CKVMInterface

/// The calls, by name, and how each is read. A reader that returns nil has complained.
extension ScriptReader {
    typealias Read = @Sendable (inout ScriptReader, inout CallFields) -> Step?

    static let calls: [(String, Read)] = hostCalls + machineCalls + memoryCalls

    // MARK: The process's memory

    private static let hostCalls: [(String, Read)] = [
        ("host", { $0.readHost(&$1) }),
        (
            "mmap",
            { reader, fields in
                guard let place = reader.hostPlace(&fields) else { return nil }
                let length = fields.number("length")
                let rights = fields.rights("prot", or: [.read, .write])
                guard let source = reader.mapSource(&fields, of: place) else { return nil }
                return .map(place, length: length, rights, source, replaces: !fields.isYes("noreplace"))
            }
        ),
        (
            "munmap",
            { reader, fields in reader.hostPlace(&fields).map { .unmap($0, length: fields.number("length")) } }
        ),
        (
            "mprotect",
            { reader, fields in
                let place = reader.hostPlace(&fields)
                let length = fields.number("length")
                let rights = fields.rights("prot", or: nil)
                return place.map { .protect($0, length: length, rights) }
            }
        ),
        (
            "madvise",
            { reader, fields in
                let place = reader.hostPlace(&fields)
                let length = fields.number("length")
                let advice = fields.choice("advice", Advice.allCases.map { ($0.name, $0) }, or: nil)
                guard let place, let advice else { return nil }
                return .advise(place, length: length, advice)
            }
        ),
        (
            "mremap",
            { reader, fields in
                let place = reader.hostPlace(&fields)
                let length = fields.number("length")
                let newLength = fields.number("new_length")
                var target: HostPlace?
                if let token = fields.optional("to") {
                    guard let place = reader.place(token, fields) else { return nil }
                    target = place
                }
                return place.map { .remap($0, length: length, newLength: newLength, to: target) }
            }
        ),
        (
            "truncate",
            { reader, fields in
                let region = reader.object(&fields)
                let most = region.map { reader.size(of: $0) } ?? .max
                let size = fields.number("size", most: most)
                return region.map { .truncate(region: $0, size: size) }
            }
        ),
        ("punch", { $0.readPunch(&$1) }),
        (
            "load",
            { reader, fields in
                let place = reader.hostPlace(&fields)
                let repetition = fields.wordRepetition()
                return place.map { .load($0, repetition) }
            }
        ),
        (
            "store",
            { reader, fields in
                let place = reader.hostPlace(&fields)
                let repetition = fields.wordRepetition()
                let value = fields.number("value")
                return place.map { .store($0, repetition, value: value) }
            }
        ),
        ("vmsplice", { reader, fields in reader.hostPlace(&fields).map { .splice($0) } }),
        ("drain", { _, _ in .drain }),
        ("process", { reader, fields in reader.newProcess(&fields).map { .fork(process: $0) } }),
        ("exit", { _, _ in .exit }),
    ]

    private mutating func readHost(_ fields: inout CallFields) -> Step? {
        let kind = fields.choice("kind", HostKind.allCases.map { ($0.rawValue, $0) }, or: HostKind?.none)
        let sizeToken = fields.required("size", "1M")
        let rights = fields.rights("prot", or: [.read, .write])
        let size = sizeToken.map { fields.number($0) } ?? 0
        let region = newRegion(&fields, kind ?? .none, size: size)
        guard let kind, let sizeToken else { return nil }
        if size == 0 || size % kind.granule != 0 || size > Self.largestHostRegion {
            fields.complain(
                sizeToken, "a region of kind \(kind.rawValue) can't have this size",
                "a multiple of \(kind.granule == 4096 ? "4k" : "2M"), at most 1G")
        }
        return region.map { .host(region: $0, kind, size: size, rights) }
    }

    /// `host=NAME offset=N`; an offset of 0 may be left out.
    private mutating func hostPlace(_ fields: inout CallFields) -> HostPlace? {
        let region = region(&fields)
        let offset = fields.number("offset", or: 0)
        return region.map { HostPlace(.region($0), offset) }
    }

    private mutating func mapSource(_ fields: inout CallFields, of place: HostPlace) -> MapSource? {
        let offset = fields.number("source_offset", or: 0)
        guard let token = fields.optional("source") else { return .anonymous }
        switch token.text {
        case "anonymous": return .anonymous
        case "shared_anonymous": return .sharedAnonymous
        default: return object(token, fields).map { .object(region: $0, offset: offset) }
        }
    }

    // KEEP_SIZE, and with PUNCH_HOLE.
    private static let keepSize: UInt64 = 1
    private static let punchHole: UInt64 = 3

    private mutating func readPunch(_ fields: inout CallFields) -> Step? {
        if fields.has("memfd") {
            let memfd = memfd(&fields)
            let mode = fields.number("mode", or: Self.punchHole, most: 0x7fff_ffff)
            let (offset, length) = (fields.number("offset"), fields.number("length"))
            return memfd.map { .allocate(memfd: $0, mode: mode, offset: offset, length: length) }
        }
        let region = object(&fields)
        let (offset, length) = (fields.number("offset"), fields.number("length"))
        return region.map { .punchHost(region: $0, offset: offset, length: length) }
    }

    // MARK: VMs, vCPUs, capabilities

    private static let machineCalls: [(String, Read)] = [
        (
            "vm",
            { reader, fields in
                let type = fields.bits("type", vmTypes, or: 0)
                return reader.newVM(&fields).map { .createVM(vm: $0, type: type) }
            }
        ),
        (
            "vcpu",
            { reader, fields in
                let id = fields.number("id", or: 0)
                guard let vm = reader.vm(&fields) else { return nil }
                return .createCPU(CPU(vm: vm, cpu: reader.cpu(vm: vm, creating: id)), id: id)
            }
        ),
        ("close", { $0.readClose(&$1) }),
        (
            "enable_cap",
            { reader, fields in
                let capability = fields.bits("cap", capabilities, or: nil, most: 0xffff_ffff)
                let flags = fields.number("flags", or: 0, most: 0xffff_ffff)
                var arguments: [UInt64] = []
                if let token = fields.optional("args") { arguments = fields.list(token, most: 4) }
                return reader.vm(&fields).map {
                    .enableCapability(vm: $0, capability: capability, flags: flags, arguments: arguments)
                }
            }
        ),
        (
            "check_extension",
            { reader, fields in
                let capability = fields.bits("cap", capabilities, or: nil)
                let isDevice = fields.choice("of", [("vm", false), ("device", true)], or: false)
                if isDevice == true { return .checkExtension(vm: nil, capability: capability) }
                return reader.vm(&fields).map { .checkExtension(vm: $0, capability: capability) }
            }
        ),
        (
            "stats",
            { reader, fields in
                guard let vm = reader.vm(&fields) else { return nil }
                var cpu: Int?
                if let token = fields.optional("cpu") {
                    guard let found = reader.cpu(vm, token, fields) else { return nil }
                    cpu = found.cpu
                }
                guard let token = fields.required("names", "pages_4k,pf_fixed") else { return nil }
                return .statistics(vm: vm, cpu: cpu, names: token.text.split(separator: ",").map(String.init))
            }
        ),
        (
            "guest",
            { $0.readGuest(&$1) }
        ),
    ]

    static let vmTypes: [(String, UInt64)] = [
        ("default", UInt64(KVM_X86_DEFAULT_VM)), ("sw_protected", UInt64(KVM_X86_SW_PROTECTED_VM)),
    ]

    private mutating func readClose(_ fields: inout CallFields) -> Step? {
        if fields.has("memfd") { return memfd(&fields).map { .close(.memfd($0)) } }
        if fields.has("cpu") { return cpu(&fields).map { .close(.cpu($0)) } }
        guard fields.has("vm") else {
            _ = (fields.optional("vm"), fields.optional("cpu"), fields.optional("memfd"))
            fields.complain(fields.call, "close what?", "vm=NAME, cpu=NUMBER or memfd=NAME")
            return nil
        }
        return vm(&fields).map { .close(.vm($0)) }
    }

    private mutating func readGuest(_ fields: inout CallFields) -> Step? {
        let kinds = GuestAccess.Kind.allCases.map(\.rawValue)
        guard let word = fields.takeWord() else {
            fields.complain(fields.call, "the guest does what?", "one of: \(kinds.joined(separator: ", "))")
            return nil
        }
        guard let kind = GuestAccess.Kind(rawValue: word.text) else {
            fields.complain(
                word, "the guest can't \(CallFields.shown(word.text))", "one of: \(kinds.joined(separator: ", "))")
            return nil
        }
        let cpu = cpu(&fields)
        let address = fields.required("gpa", "0x10000")
        let size = fields.choice("size", [("8", 8), ("4", 4), ("2", 2), ("1", 1)], or: UInt64(8)) ?? 8
        let repetition = fields.repetition()
        let value = fields.number("value", or: 0)
        let emulated = fields.choice("by", [("native", false), ("emulator", true)], or: false) ?? false
        guard let cpu, let address else { return nil }
        let start = fields.number(address)
        if start % size != 0 || (repetition.count > 1 && repetition.stride % size != 0) {
            fields.complain(address, "an access that is not aligned", "gpa and stride are multiples of the size")
        }
        return .guest(
            cpu, GuestAccess(kind, start, size: size, repetition, value: value, emulated: emulated))
    }

    // MARK: The guest's memory

    private static let memoryCalls: [(String, Read)] = [
        ("region", { $0.readRegion(&$1, version: 1) }),
        ("region2", { $0.readRegion(&$1, version: 2) }),
        (
            "get_dirty_log",
            { reader, fields in
                let slot = fields.slot()
                let buffer = fields.choice("bitmap", [("buffer", true), ("null", false)], or: true) ?? true
                return reader.vm(&fields).map { .getDirtyLog(vm: $0, slot: slot, hasBuffer: buffer) }
            }
        ),
        (
            "clear_dirty_log",
            { reader, fields in
                let slot = fields.slot()
                let (first, count) = (fields.number("first"), fields.number("count", most: 0xffff_ffff))
                guard let token = fields.required("bits", "all") else { return nil }
                let bits: ClearedPages.Bits =
                    switch token.text {
                    case "all": .all
                    case "null": .missing
                    default: .words(fields.list(token, most: Self.mostWords))
                    }
                let pages = ClearedPages(slot: slot, first: first, count: count, bits: bits)
                return reader.vm(&fields).map { .clearDirtyLog(vm: $0, pages) }
            }
        ),
        (
            "memfd",
            { reader, fields in
                let (size, flags) = (fields.number("size"), fields.number("flags", or: 0))
                guard let vm = reader.vm(&fields), let memfd = reader.newMemfd(&fields) else { return nil }
                return .createMemfd(vm: vm, memfd: memfd, size: size, flags: flags)
            }
        ),
        (
            "allocate",
            { reader, fields in
                let memfd = reader.memfd(&fields)
                let mode = fields.number("mode", or: keepSize, most: 0x7fff_ffff)
                let (offset, length) = (fields.number("offset"), fields.number("length"))
                return memfd.map { .allocate(memfd: $0, mode: mode, offset: offset, length: length) }
            }
        ),
        (
            "attributes",
            { reader, fields in
                let (address, size) = (fields.number("gpa"), fields.number("size"))
                let words = [("private", KVM_MEMORY_ATTRIBUTE_PRIVATE), ("none", UInt64(0))]
                let attributes = fields.bits("attributes", words, or: nil)
                let flags = fields.number("flags", or: 0)
                return reader.vm(&fields).map {
                    .setAttributes(vm: $0, address: address, size: size, attributes: attributes, flags: flags)
                }
            }
        ),
        (
            "prefault",
            { reader, fields in
                let (address, size) = (fields.number("gpa"), fields.number("size"))
                let flags = fields.number("flags", or: 0)
                return reader.cpu(&fields).map { .preFault($0, address: address, size: size, flags: flags) }
            }
        ),
        (
            "ring_collect",
            { reader, fields in
                let most = fields.number("max", or: 1 << 16)
                return reader.cpu(&fields).map { .collectRing($0, most: most) }
            }
        ),
        ("ring_reset", { reader, fields in reader.vm(&fields).map { .resetRings(vm: $0) } }),
        (
            "no_argument",
            { reader, fields in
                let call = fields.choice("call", StructureCall.allCases.map { ($0.rawValue, $0) }, or: nil)
                guard let vm = reader.vm(&fields), let call else { return nil }
                return .withoutArgument(vm: vm, call)
            }
        ),
    ]

    static let regionFlags: [(String, UInt64)] = [
        ("none", 0), ("log_dirty", UInt64(KVM_MEM_LOG_DIRTY_PAGES)), ("readonly", UInt64(KVM_MEM_READONLY)),
        ("guest_memfd", UInt64(KVM_MEM_GUEST_MEMFD)),
    ]

    private mutating func readRegion(_ fields: inout CallFields, version: Int) -> Step? {
        let slot = fields.slot()
        let flags = fields.bits("flags", Self.regionFlags, or: 0, most: 0xffff_ffff)
        let (address, size) = (fields.number("gpa"), fields.number("size"))
        var place = HostPlace(.null)
        if let token = fields.required("hva", "\(names.regions.first ?? "ram")+0x1000") {
            guard let found = self.place(token, fields) else { return nil }
            place = found
        }
        var memfd: Int?
        var offset: UInt64 = 0
        if version == 2 {
            offset = fields.number("offset", or: 0)
            if let token = fields.optional("memfd") {
                guard let found = self.memfd(token, fields) else { return nil }
                memfd = found
            }
        }
        let region = Region(
            slot: slot, flags: flags, guestAddress: address, size: size, userAddress: place, memfd: memfd,
            memfdOffset: offset)
        return vm(&fields).map { .setRegion(vm: $0, region, version: version) }
    }
}

extension CallFields {
    /// `slot=3`, `slot=1:3` in address space 1, or the number that the call takes.
    fileprivate mutating func slot() -> UInt64 {
        guard let token = required("slot", "0") else { return 0 }
        let parts = token.text.split(separator: ":", maxSplits: 1, omittingEmptySubsequences: false).map(String.init)
        guard parts.count == 2 else { return number(token, most: 0xffff_ffff) }
        let column = token.column + parts[0].unicodeScalars.count + 1
        let space = number(Token(text: parts[0], column: token.column), most: 0xffff)
        return space << 16 | number(Token(text: parts[1], column: column), most: 0xffff)
    }

    fileprivate mutating func repetition() -> Repetition {
        Repetition(
            count: number("count", or: 1, most: ScriptReader.mostAccesses), stride: number("stride", or: 4096))
    }

    /// Of the process's own accesses, which are of 8 bytes. `offset` has been read.
    fileprivate mutating func wordRepetition() -> Repetition {
        let repetition = repetition()
        if number("offset", or: 0) % 8 != 0 || (repetition.count > 1 && repetition.stride % 8 != 0) {
            complain(call, "an access that is not aligned", "offset and stride are multiples of 8")
        }
        return repetition
    }

    /// `rwx`, any of them, or `none`.
    fileprivate mutating func rights(_ key: String, or missing: Rights?) -> Rights {
        guard let token = missing == nil ? required(key, "rw") : optional(key) else { return missing ?? [] }
        if token.text == "none" { return [] }
        var rights: Rights = []
        for letter in token.text {
            switch letter {
            case "r": rights.insert(.read)
            case "w": rights.insert(.write)
            case "x": rights.insert(.execute)
            default:
                complain(token, "\(key) can't be \(Self.shown(token.text))", "letters of rwx, or none")
                return rights
            }
        }
        if token.text.isEmpty { complain(token, "\(key) is empty", "letters of rwx, or none") }
        return rights
    }
}
