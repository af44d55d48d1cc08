import Testing

@testable import TraceAudit

/// Random fields, the same for the same seed.
struct SeededNumbers: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
        return (state ^ state >> 29) &* 0x9e37_79b9_7f4a_7c15
    }

    /// A number of any magnitude.
    mutating func number(bits: UInt64 = 64) -> UInt64 { (next() >> (64 - bits)) >> (next() % bits) }
}

private func parse(_ kind: EventKind, _ body: String) -> EventBody? {
    var body = body
    return body.withUTF8 { bytes in
        guard let base = bytes.baseAddress else { return nil }
        return EventBody.parse(kind, ByteCursor(base, base + bytes.count))
    }
}

private func hexText(_ value: UInt64) -> String { String(value, radix: 16) }

/// `%#016lx`: fourteen digits after `0x`.
private func range14(_ value: UInt64) -> String {
    let digits = hexText(value)
    return "0x" + String(repeating: "0", count: max(0, 14 - digits.count)) + digits
}

@Suite struct Tracepoints_Formats {
    static let seeds: [UInt64] = [1, 2, 3, 5, 8, 13]

    @Test(arguments: seeds) func `an entry set reads back`(seed: UInt64) {
        var numbers = SeededNumbers(state: seed)
        for _ in 0..<200 {
            let user: Bool? = [true, false, nil][Int(numbers.next() % 3)]
            let event = EntrySet(
                frame: numbers.number(), entry: numbers.number(), level: Int(numbers.next() % 5) + 1,
                at: numbers.number(), printedWrite: numbers.next() % 2 == 0, printedExecute: numbers.next() % 2 == 0,
                printedUser: user)
            let flags =
                "r" + (event.printedWrite ? "w" : "-") + (event.printedExecute ? "x" : "-")
                + (user.map { $0 ? "u" : "-" } ?? "")
            let text =
                "gfn \(hexText(event.frame)) spte \(hexText(event.entry)) (\(flags)) level \(event.level) at "
                + hexText(event.at)
            #expect(parse(.entrySet, text) == .entrySet(event), "seed \(seed): \(text)")
        }
    }

    @Test(arguments: seeds) func `requests, changes and ranges read back`(seed: UInt64) {
        var numbers = SeededNumbers(state: seed)
        for _ in 0..<200 {
            let frame = numbers.number()
            let pfn = numbers.number()
            let old = numbers.number()
            let new = numbers.number()
            let level = Int(numbers.next() % 5) + 1
            #expect(
                parse(.entryRequested, "gfn \(hexText(frame)) pfn \(hexText(pfn)) level \(level)")
                    == .entryRequested(EntryRequested(frame: frame, hostFrame: pfn, level: level)))
            #expect(
                parse(
                    .entryChanged,
                    "as id 1 gfn \(hexText(frame)) level \(level) old_spte \(hexText(old)) new_spte \(hexText(new))")
                    == .entryChanged(EntryChanged(addressSpace: 1, frame: frame, level: level, old: old, new: new)))
            let range = HostRange(start: old, end: new)
            #expect(
                parse(.unmapRange, "mmu notifier unmap range: \(range14(old)) -- \(range14(new))")
                    == .unmapRange(range))
            #expect(parse(.ageRange, "mmu notifier age hva: \(range14(old)) -- \(range14(new))") == .ageRange(range))
            #expect(parse(.testAge, "mmu notifier test age hva: \(range14(old))") == .testAge(old))
            #expect(
                parse(.tableWalk, "addr \(hexText(frame)) pferr \(hexText(old)) P|W|U")
                    == .tableWalk(address: frame, errorCode: old))
            #expect(
                parse(.zapAllFast, "kvm-mmu-valid-gen 1 used_pages \(hexText(new))")
                    == .zapAllFast(generation: 1, pages: new))
            #expect(
                parse(.splitHugePage, "gfn \(hexText(frame)) spte \(hexText(new)) level 2 errno -12")
                    == .splitHugePage(frame: frame, level: 2, errno: -12))
            #expect(
                parse(.pageFault, "vcpu 3 rip 0x\(hexText(pfn)) address \(range14(old)) error_code 0x\(hexText(new))")
                    == .pageFault(address: old, errorCode: new))
            #expect(
                parse(.pageFault, "address \(hexText(old)) error_code \(hexText(new))")
                    == .pageFault(address: old, errorCode: new))
            #expect(
                parse(.checkMMIO, "spte \(hexText(old)) kvm_gen \(hexText(new)) spte-gen \(hexText(pfn)) valid 1")
                    == .checkMMIO(MMIOCheck(entry: old, currentGeneration: new, entryGeneration: pfn, valid: true)))
        }
    }

    @Test(arguments: ["P|W|U", "", "P|W|0x100000000"])
    func `a fast page fault reads back whatever its flags`(flags: String) {
        let text = "vcpu 2 gva 7f00 error_code \(flags) sptep 00000000deadbeef old 0x25 new 27 spurious 0 fixed 1"
        #expect(
            parse(.fastPageFault, text)
                == .fastPageFault(FastPageFault(address: 0x7f00, old: 0x25, new: 0x27, spurious: false, fixed: true)))
    }

    @Test func `every shape of a shadow page reads back`() {
        let access = ["---", "--x", "w--", "w-x", "-u-", "-ux", "wu-", "wux"]
        for (index, word) in access.enumerated() {
            for level in 1...5 {
                for (direct, invalid, unsync) in [(true, false, false), (false, true, false), (false, false, true)] {
                    let text =
                        "sp gen 1 gfn 8000 l\(level) \(direct ? 8 : 4)-byte q\(level % 4)\(direct ? " direct" : "") "
                        + "\(word)\(invalid ? " invalid" : "") \(direct ? "!" : "")nxe \(invalid ? "!" : "")ad root 2 "
                        + (unsync ? "unsync" : "sync")
                    let event = TableEvent(
                        generation: 1, frame: 0x8000, level: level, entryBytes: direct ? 8 : 4, quadrant: level % 4,
                        direct: direct, access: index, invalid: invalid, rootCount: 2, unsync: unsync, created: nil)
                    #expect(parse(.zapTable, text) == .table(.zapTable, event), "\(text)")
                    var found = event
                    found.created = false
                    #expect(parse(.getTable, text + " existing") == .table(.getTable, found))
                    #expect(parse(.getTable, text) == nil)
                }
            }
        }
    }

    @Test(arguments: [
        (EventKind.markMMIO, "sptep:000000001234 gfn fe000 access 6 gen 2a"),
        (.handleMMIO, "addr:fe000000 gfn fe000 access 6"),
        (.dirtyLogFull, "vcpu 0: PML full"), (.fastMMIO, "fast mmio at gpa 0xfe000000"),
        (.matchMMIO, "gva 0x10000000 gpa 0x10000000 Read GVA"),
        (.accessMMIO, "mmio unsatisfied-read len 8 gpa 0x10000000 val 0x0"),
        (.ringPush, "ring 0: dirty 0x1 reset 0x0 slot 1 offset 0x2 (used 1)"),
        (.ringReset, "ring 0: dirty 0x1 reset 0x1 (used 0)"), (.ringExit, "vcpu 0"),
        (.asyncTry, "gva = 0x7f, gfn = 0x7"), (.asyncRepeated, "gva = 0x7f, gfn = 0x7"),
        (.asyncNotPresent, "token 0x1 gva 0x2"), (.asyncReady, "token 0x1 gva 0x2"),
        (.asyncCompleted, "gva 0x1 address 0x2"),
    ])
    func `an event that is only counted must have its shape`(kind: EventKind, text: String) {
        #expect(parse(kind, text) == .counted(kind))
        #expect(parse(kind, "something else") == nil)
    }

    @Test func `the steps of a walk of the guest's tables`() {
        #expect(parse(.walkedElement, "pte 2007 level 4") == .walkedElement(entry: 0x2007, level: 4))
        #expect(parse(.setAccessed, "gpa 4038") == .setFlag(.setAccessed, at: 0x4038))
        #expect(parse(.setDirty, "gpa 4038") == .setFlag(.setDirty, at: 0x4038))
        #expect(parse(.walkerError, "pferr 6 W|U") == .walkerError(6))
        for (kind, text) in [(EventKind.walkedElement, "pte 2007 level 6"), (.setDirty, "gpa x"), (.walkerError, "x")] {
            #expect(parse(kind, text) == nil)
        }
    }

    @Test func `the first byte of an emulated instruction is read`() {
        #expect(parse(.emulate, "0:e000100b:e6 10 (prot64)") == .emulate(firstByte: 0xe6))
        #expect(parse(.emulate, "odd") == .emulate(firstByte: nil))
    }

    @Test func `a body cut anywhere is malformed or whole, never a crash`() {
        let text = "sp gen 0 gfn e0010 l4 8-byte q0 wux invalid nxe ad root 1 sync"
        for length in 0..<text.count - 4 { #expect(parse(.zapTable, String(text.prefix(length))) == nil) }
    }
}

@Suite struct Tracepoints_LinePrefix {
    private func line(_ text: String) -> (
        command: String, thread: UInt32, process: UInt32?, time: UInt64, event: String
    )? {
        var text = text
        return text.withUTF8 { bytes in
            guard let base = bytes.baseAddress, let line = RecordingLine(ByteCursor(base, base + bytes.count)) else {
                return nil
            }
            return (line.command.text, line.thread, line.process, line.time, line.event.text)
        }
    }

    @Test(arguments: [
        "            scen-17908   [001] ...1.  2016.160225: kvm_fpu: load",
        "            scen-17908   [001]  2016.160225: kvm_fpu:     load",
        "            scen-17908   [001] ...1.  2016.160225000: kvm_fpu: load",
        "scen 17908 [001] 2016.160225: kvm:kvm_fpu: load",
    ])
    func `ftrace, trace-cmd and perf prefixes are read`(text: String) throws {
        let found = try #require(line(text))
        #expect(found.command == "scen")
        #expect(found.thread == 17908)
        #expect(found.process == nil)
        #expect(found.time == 2_016_160_225_000)
        #expect(found.event == "kvm_fpu")
    }

    @Test func `the process column and odd command names are read`() throws {
        let first = try #require(line(" CPU 0/KVM-[x]-4711    (   4700) [012] d..1.    5.000001: kvm_fpu: load"))
        #expect(first.command == "CPU 0/KVM-[x]")
        #expect(first.thread == 4711)
        #expect(first.process == 4700)
        let unknown = try #require(line("          <idle>-0       (-------) [000] d.h1.    5.000001: kvm_fpu: load"))
        #expect(unknown.command == "<idle>")
        #expect(unknown.process == nil)
    }

    @Test(arguments: [
        "", "x", "scen-1 [001]", "scen-1 [001] ...1. 5.1", "scen-1 [001] ...1. 5.1: ", "scen [001] ...1. 5.1: a: b",
        "scen-1 [zz] ...1. 5.1: a: b", "-1 [0] 99999999999999999999.1: a: b",
    ])
    func `what is no event line is refused`(text: String) {
        #expect(line(text) == nil)
    }
}
