import Machine

// The steps by which a guest changes its own page tables, under shadow paging.

extension Vocabulary {
    /// In the order of `GuestRights`.
    static let guestRights: [Choice] = [
        Choice("read", "P and U"),
        Choice("write", "P, W and U; D is set already"),
        Choice("clean", "P, W and U; D is not set yet, so that KVM sees the first write"),
    ]

    static let tableSteps: [Key] = [
        action(
            "map_page", .guestStep, .guestPlace,
            "the guest stores an entry of its page tables: the linear address shows the guest's memory at `to`",
            example: "{map_page: 0x20000000, to: ram, rights: read}", ["to", "rights", "level"], answers: stores),
        action(
            "unmap_page", .guestStep, .guestPlace, "the guest stores 0 into the entry of a linear address",
            example: "{unmap_page: ram, level: 2}", ["level"], answers: stores),
        action(
            "protect_page", .guestStep, .guestPlace,
            "the guest loads the entry of a linear address and stores it with other rights",
            example: "{protect_page: ram, rights: read}", ["rights", "level"], answers: stores),
        action(
            "restore_page", .guestStep, .guestPlace,
            "the guest stores the entry that was there at the start: one to one, or of the table below",
            example: "{restore_page: ram, level: 2}", ["level"], answers: stores),
        action(
            "invlpg", .guestStep, .guestPlace, "the guest flushes a linear address (INVLPG)", example: "{invlpg: ram}"),
        action(
            "load_cr3", .guestStep, .nothing, "the guest flushes all: it loads CR3 with the value that it has",
            example: "load_cr3"),
    ]
    private static let stores: [Answer] = [.ok] + exits + [.errno]

    static let tableParameters: [Key] = [
        Key("to", .guestStep, .guestPlace, .required, "the guest physical address of the page", example: "ram+4 KiB"),
        Key(
            "rights", .guestStep, .choice(guestRights), .optional("write"), "what the entry permits", example: "read"),
        Key(
            "level", .guestStep, .number(1...4), .optional("1"),
            "of the entry; `map_page` at level 2 maps a page of 2 MiB", example: "2"),
    ]
}
