/// The field readers of the structured event bodies. Spec: x86 10, the table of exact formats.

extension EntrySet {
    init?(_ cursor: inout ByteCursor) {
        guard let frame = cursor.hexadecimal(after: "gfn "), let entry = cursor.hexadecimal(after: " spte "),
            cursor.skip(" (")
        else { return nil }
        guard cursor.skip("r") || cursor.skip("-") else { return nil }
        let write = cursor.skip("w")
        guard write || cursor.skip("-") else { return nil }
        let execute = cursor.skip("x")
        guard execute || cursor.skip("-") else { return nil }
        let user: Bool? = cursor.skip("u") ? true : cursor.skip("-") ? false : nil
        guard cursor.skip(")"), let level = cursor.decimal(after: " level "), (1...5).contains(level),
            let at = cursor.hexadecimal(after: " at ")
        else { return nil }
        self.init(
            frame: frame, entry: entry, level: Int(level), at: at, printedWrite: write, printedExecute: execute,
            printedUser: user)
    }
}

extension EntryRequested {
    init?(_ cursor: inout ByteCursor) {
        guard let frame = cursor.hexadecimal(after: "gfn "), let host = cursor.hexadecimal(after: " pfn "),
            let level = cursor.decimal(after: " level "), (1...5).contains(level)
        else { return nil }
        self.init(frame: frame, hostFrame: host, level: Int(level))
    }
}

extension EntryChanged {
    init?(_ cursor: inout ByteCursor) {
        guard let space = cursor.decimal(after: "as id "), space <= 255,
            let frame = cursor.hexadecimal(after: " gfn "), let level = cursor.decimal(after: " level "),
            (1...5).contains(level), let old = cursor.hexadecimal(after: " old_spte "),
            let new = cursor.hexadecimal(after: " new_spte ")
        else { return nil }
        self.init(addressSpace: Int(space), frame: frame, level: Int(level), old: old, new: new)
    }
}

extension TableEvent {
    /// The eight access words, at the index of their `ACC` value (exec 1, write 2, user 4).
    private static let accessWords: [StaticString] = ["---", "--x", "w--", "w-x", "-u-", "-ux", "wu-", "wux"]

    init?(_ cursor: inout ByteCursor) {
        guard let generation = cursor.decimal(after: "sp gen "), let frame = cursor.hexadecimal(after: " gfn "),
            let level = cursor.decimal(after: " l"), (1...5).contains(level),
            let bytes = cursor.decimal(after: " "), bytes == 4 || bytes == 8, cursor.skip("-byte"),
            let quadrant = cursor.decimal(after: " q"), quadrant < 4
        else { return nil }
        let direct = cursor.skip(" direct")
        guard cursor.skip(" "), let access = Self.accessWords.firstIndex(where: { cursor.starts(with: $0) }) else {
            return nil
        }
        cursor.advance(3)
        let invalid = cursor.skip(" invalid")
        guard cursor.skip(" ") else { return nil }
        _ = cursor.skip("!")
        guard cursor.skip("nxe ") else { return nil }
        _ = cursor.skip("!")
        guard cursor.skip("ad root "), let roots = cursor.decimal(), cursor.skip(" ") else { return nil }
        let unsync = cursor.skip("unsync")
        guard unsync || cursor.skip("sync") else { return nil }
        let created: Bool? = cursor.skip(" new") ? true : cursor.skip(" existing") ? false : nil
        self.init(
            generation: generation, frame: frame, level: Int(level), entryBytes: Int(bytes), quadrant: Int(quadrant),
            direct: direct, access: access, invalid: invalid, rootCount: roots, unsync: unsync, created: created)
    }
}

extension FastPageFault {
    init?(_ cursor: inout ByteCursor) {
        guard cursor.skip("vcpu "), cursor.signedDecimal() != nil, let address = cursor.hexadecimal(after: " gva "),
            cursor.skip(" error_code "), cursor.upTo("sptep ") != nil
        else { return nil }
        _ = cursor.word()
        guard let old = cursor.hexadecimal(after: " old "), let new = cursor.hexadecimal(after: " new "),
            let spurious = cursor.decimal(after: " spurious "), let fixed = cursor.decimal(after: " fixed ")
        else { return nil }
        self.init(address: address, old: old, new: new, spurious: spurious != 0, fixed: fixed != 0)
    }
}

extension MMIOCheck {
    init?(_ cursor: inout ByteCursor) {
        guard let entry = cursor.hexadecimal(after: "spte "), let current = cursor.hexadecimal(after: " kvm_gen "),
            let own = cursor.hexadecimal(after: " spte-gen "), let valid = cursor.decimal(after: " valid ")
        else { return nil }
        self.init(entry: entry, currentGeneration: current, entryGeneration: own, valid: valid != 0)
    }
}
