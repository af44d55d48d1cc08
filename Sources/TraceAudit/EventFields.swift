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
