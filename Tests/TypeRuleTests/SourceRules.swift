import Testing

/// I-4, as far as a compiler can't tell one file from another.
@Suite struct I4_TheHeuristicIsNamedByTheOldPoliciesAlone {
    private static let allowed = [
        "Sources/GuestMemory/Policies/Guess.swift", "Sources/GuestMemory/Policies/Tracked.swift",
        "Sources/HostMemory/LegacyAdoption.swift", "Sources/HostMemory/LegacyPageLookup.swift",
    ]

    @Test func `only the files of guess and tracked name the legacy page lookup`() throws {
        let naming = try SwiftSource.all(under: "Sources").filter { !$0.hits(#/\bLegacyPage(Lookup)?\b/#).isEmpty }
        #expect(naming.map(\.path) == Self.allowed)
    }

    @Test func `stage-2 code asks no page for its state`() throws {
        for source in try stageTwoSources() {
            #expect(source.hits(#/\.inspect\(|\bPageState\b|\bPageFlags\b/#) == [])
        }
    }
}

/// I-6, where raw memory would be a way round the permits.
@Suite struct I6_EntriesAreReachedThroughStageTwoEntry {
    @Test func `stage-2 code has no word of memory that is not behind a StageTwoEntry`() throws {
        for source in try stageTwoSources() where source.path != "Sources/GuestMemory/StageTwoEntry.swift" {
            #expect(source.hits(#/\bAtomicWord\b|\.word\(at:/#) == [])
            // To read one for a report or a check is allowed.
            let bare = source.hits(#/memory\.entry\(/#).filter {
                !$0.contains("StageTwoEntry(") && !$0.contains(#/memory\.entry\(.*\)\.(load|peek)\(\)/#)
            }
            #expect(bare == [])
        }
    }

    @Test func `raw bytes are used by frame caches alone`() throws {
        let naming = try stageTwoSources().filter { !$0.hits(#/\bSharedBytes\b/#).isEmpty }
        #expect(naming.map(\.path) == ["Sources/GuestMemory/FrameCache/CachedBytes.swift"])
    }

    @Test func `page tables are not written as bytes`() throws {
        for source in try SwiftSource.all(under: "Sources/Paging") {
            #expect(source.hits(#/\.bytes\(of:/#) == [])
        }
    }
}

private func stageTwoSources() throws -> [SwiftSource] {
    try SwiftSource.all(under: "Sources/GuestMemory") + SwiftSource.all(under: "Sources/Paging")
}

/// The modules of the core, leaf first, and what each may import.
enum CoreModule: String, CaseIterable, Sendable {
    case frames = "Frames"
    case synchrony = "Synchrony"
    case audit = "Audit"
    case hostMemory = "HostMemory"
    case guestMemory = "GuestMemory"
    case paging = "Paging"
    case hardware = "Hardware"

    var mayImport: Set<String> {
        switch self {
        case .frames: []
        case .synchrony: ["CSchedule", "Synchronization"]
        case .audit: ["Frames", "Synchronization"]
        case .hostMemory: ["Frames", "Synchrony", "Audit", "Synchronization"]
        case .guestMemory: CoreModule.hostMemory.mayImport.union(["HostMemory"])
        case .paging: CoreModule.guestMemory.mayImport.union(["GuestMemory"])
        // Shares nothing with Paging or GuestMemory, so that one mistake can't hide in both.
        case .hardware: ["Frames", "Synchrony", "Audit", "HostMemory", "Synchronization"]
        }
    }

    func sources() throws -> [SwiftSource] { try SwiftSource.all(under: "Sources/\(rawValue)") }
}

/// The core compiles in Embedded Swift and knows no operating system.
@Suite struct CoreLayering {
    @Test(arguments: CoreModule.allCases)
    func `a core module imports what lies below it`(_ module: CoreModule) throws {
        let sources = try module.sources()
        #expect(!sources.isEmpty)
        for source in sources {
            #expect(Set(source.imports).subtracting(module.mayImport) == [], "\(source.path)")
        }
    }

    @Test(arguments: CoreModule.allCases)
    func `a core module needs nothing that Embedded Swift lacks`(_ module: CoreModule) throws {
        for source in try module.sources() { #expect(forbidden(in: source) == []) }
    }

    @Test func `what Embedded Swift lacks is found where it is used`() {
        let bad = [
            "let a: any Sequence<Int>", "let a: Any = 1", "func f() throws {", "func f() rethrows {", "try await g()",
            "func f() async {", "var a: Dictionary<Int, Int>", "var a: [Int: UInt64] = [:]", "func f(_ a: [A.B: C?])",
            "var a = Set<Int>()", "let a: Set<Int>", "let a = String(1)", "print(a)", "let a = \\Int.self",
            "Mirror(reflecting: a)", "a.map(\\.count)", "let a = [:]",
            "withUnsafeBytes(of: a) { $0.load(as: Int.self) }", "withUnsafeBytes(of: a) { $0[i] }",
        ]
        for line in bad { #expect(forbidden(in: SwiftSource(path: "bad", text: line)).count == 1, "\(line)") }
        let good = [
            "// any Sequence throws", "let a: StaticString = \"print(any)\"", "func f() throws(Errno) {",
            "do throws(Errno) {", "let a: [Int] = []", "f(a[at: b], [c])", "/* async */ let many = 1",
            "entry.set(bits: a)", "x ? [a] : [b]",
            "withUnsafeBytes(of: a) { write($0) }", "withUnsafeBytes(of: a) { bytes in",
        ]
        for line in good { #expect(forbidden(in: SwiftSource(path: "good", text: line)) == [], "\(line)") }
    }

    @Test func `imports are found in every spelling`() {
        let text =
            "import A\n@testable import B\npublic import C\n  import struct D.E\n@_spi(F) import G\n// import H\n"
        #expect(SwiftSource(path: "", text: text).imports == ["A", "B", "C", "D", "G"])
    }

    private func forbidden(in source: SwiftSource) -> [String] {
        let existential = source.hits(#/\bany\s+[A-Z(]|\bAny\b/#)
        let untypedThrows = source.hits(#/\brethrows\b|\bthrows\b(?!\s*\()/#)
        let concurrency = source.hits(#/\basync\b|\bawait\b/#)
        let hashed = source.hits(#/\bDictionary\b|\bSet\s*[<(]|\[:\]|\[[A-Z][\w.]*\s*:\s*[A-Z][\w.]*\??\]/#)
        let runtime = source.hits(#/\bString\b|\bMirror\b|\bprint\(|\\\w*\.\w/#)
        // At a constant offset 0 of a tuple, Swift 6.3 reads nothing there. `InlineArray` is right.
        let tuples = source.hits(#/withUnsafe(Mutable)?Bytes\(of:.*(\.load|\$0\[)/#)
        // A line that breaks two rules is one line to mend.
        return Set(existential + untypedThrows + concurrency + hashed + runtime + tuples).sorted()
    }
}
