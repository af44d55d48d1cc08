/// The shadow-page events, as three programs print them.
///
/// The kernel prints its own text (ftrace). libtraceevent, which trace-cmd and perf print with, can't evaluate the format
/// of these events: with its plugin for KVM it prints the plugin's text, without it the raw fields. Seen with
/// libtraceevent 1.7.1. Spec: x86 10, `<SP>`.
extension TableEvent {
    /// The eight access words, at the index of their `ACC` value (exec 1, write 2, user 4).
    private static let accessWords: [StaticString] = ["---", "--x", "w--", "w-x", "-u-", "-ux", "wu-", "wux"]

    init?(_ cursor: inout ByteCursor) {
        if cursor.starts(with: "sp gen ") {
            self.init(kernelText: &cursor)
        } else if cursor.starts(with: "new sp ") || cursor.starts(with: "existing sp ") {
            self.init(pluginText: &cursor)
        } else {
            self.init(fields: cursor)
        }
    }

    private init?(kernelText cursor: inout ByteCursor) {
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

    /// `<new|existing> sp gfn <gfn> <level> q<quadrant>[ direct] <access>[ invalid] [!]pae [!]nxe [!]wp... root <count>
    /// <sync|unsync>`. The bit that the plugin calls PAE tells of guest tables with 4-byte entries since Linux 5.18.
    private init?(pluginText cursor: inout ByteCursor) {
        let created = cursor.skip("new")
        if !created { _ = cursor.skip("existing") }
        guard let frame = cursor.hexadecimal(after: " sp gfn "), let level = cursor.decimal(after: " "),
            (1...5).contains(level), let quadrant = cursor.decimal(after: " q"), quadrant < 4
        else { return nil }
        let direct = cursor.skip(" direct")
        guard cursor.skip(" "), let access = Self.accessWords.firstIndex(where: { cursor.starts(with: $0) }) else {
            return nil
        }
        cursor.advance(3)
        let invalid = cursor.skip(" invalid")
        let isSmall = cursor.skip(" pae")
        guard cursor.upTo(" root ") != nil, let roots = cursor.decimal(), cursor.skip(" ") else { return nil }
        let unsync = cursor.skip("unsync")
        guard unsync || cursor.skip("sync") else { return nil }
        self.init(
            generation: 0, frame: frame, level: Int(level), entryBytes: isSmall ? 4 : 8, quadrant: Int(quadrant),
            direct: direct, access: access, invalid: invalid, rootCount: roots, unsync: unsync, created: created)
    }

    /// `[FAILED TO PARSE] mmu_valid_gen=... gfn=... role=... root_count=... unsync=...[ created=...]`, the frame in
    /// decimal. Spec: x86 1.6 (bits of the role).
    private init?(fields body: ByteCursor) {
        guard let frame = body.unsigned(of: "gfn"), let role = body.unsigned(of: "role"),
            (1...5).contains(role & 0xf), let roots = body.unsigned(of: "root_count"),
            let unsync = body.unsigned(of: "unsync")
        else { return nil }
        self.init(
            generation: body.unsigned(of: "mmu_valid_gen") ?? 0, frame: frame, level: Int(role & 0xf),
            entryBytes: role >> 4 & 1 != 0 ? 4 : 8, quadrant: Int(role >> 5 & 3), direct: role >> 7 & 1 != 0,
            access: Int(role >> 8 & 7), invalid: role >> 11 & 1 != 0, rootCount: roots, unsync: unsync != 0,
            created: body.unsigned(of: "created").map { $0 != 0 })
    }

    /// The plugin's text of the events that end or change a shadow page begins with the level: the guest frame is not
    /// in it, so nothing can be told of the page.
    static func isWithoutFrame(_ body: ByteCursor) -> Bool {
        var cursor = body
        guard let level = cursor.decimal(), (1...5).contains(level) else { return false }
        return cursor.decimal(after: " q") != nil && cursor.upTo(" root ") != nil
    }
}
