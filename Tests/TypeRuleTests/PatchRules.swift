import Synchrony
import Testing

// What the series took away, patch by patch: the earlier behaviour is a program that names what is gone, and must not
// compile. The patches whose earlier behaviour can be run have their suites in `CoreTests`, most in `Patches`.

@Suite struct Patch12_NoAtomicTranslation {
    @Test(arguments: try SnippetPair.of(patch: 12))
    func `a translation can't be asked not to sleep`(_ pair: SnippetPair) throws { try pair.check() }
}

@Suite struct Patch17_NoUserAddressOfAFault {
    @Test(arguments: try SnippetPair.of(patch: 17))
    func `a fault knows no user address`(_ pair: SnippetPair) throws { try pair.check() }
}

@Suite struct Patch18_NoUserAddressFromATranslation {
    @Test(arguments: try SnippetPair.of(patch: 18))
    func `a translation answers with no user address`(_ pair: SnippetPair) throws { try pair.check() }
}

@Suite struct Patch20_NoMapThatIsNone {
    @Test(arguments: try SnippetPair.of(patch: 20))
    func `a map is made by mapping, never handed in`(_ pair: SnippetPair) throws { try pair.check() }
}

@Suite struct Patch21_AFailedMapIsNone {
    @Test(arguments: try SnippetPair.of(patch: 21))
    func `what failed to map can't be unmapped`(_ pair: SnippetPair) throws { try pair.check() }
}

@Suite struct Patch43_FaultInGivesAll {
    @Test(arguments: try SnippetPair.of(patch: 43))
    func `a fault's frame comes with its page and its writability`(_ pair: SnippetPair) throws { try pair.check() }
}

@Suite struct Patch79_NoFrameNumberOfAGuestFrame {
    @Test(arguments: try SnippetPair.of(patch: 79))
    func `no bare frame number is given out`(_ pair: SnippetPair) throws { try pair.check() }
}

@Suite struct Patch84_NoPageByItsNumber {
    @Test(arguments: try SnippetPair.of(patch: 84))
    func `no page is put or marked by its number`(_ pair: SnippetPair) throws { try pair.check() }
}

extension SnippetPair {
    static func of(patch: Int) throws -> [SnippetPair] {
        let pairs = try all(in: .takenAway).filter { $0.name.hasPrefix("patch-\(patch)-") }
        return try #require(pairs.isEmpty ? nil : pairs)
    }
}

/// That every patch has its test, and every switch its place.
@Suite struct SeriesPatches {
    /// Spec: generic section 9, the areas generic, pfncache and gmem, and the prefetch rule that generic 6 names.
    static let generic = [
        1, 2, 3, 5, 11, 12, 13, 14, 15, 16, 18, 19, 20, 21, 22, 26, 27, 28, 29, 30, 31, 33, 34, 35, 42, 43, 45, 46, 49,
        75, 76, 79, 81, 84, 85,
    ]

    /// The areas x86, x86 mmu, nVMX and VMX. 05 and 16 are among the generic ones.
    static let x86 = [
        4, 6, 7, 8, 9, 10, 17, 23, 24, 25, 32, 36, 37, 38, 39, 40, 41, 44, 47, 48, 50, 51, 82,
    ]

    @Test func `every patch has a suite that is named after it`() throws {
        let suites = try SwiftSource.all(under: "Tests").flatMap { $0.hits(#/@Suite\b.*\bstruct Patch\d\d_/#) }
        for number in Self.generic + Self.x86 {
            let name = number < 10 ? "Patch0\(number)_" : "Patch\(number)_"
            #expect(suites.filter { $0.contains(name) }.count == 1, "\(name)")
        }
    }

    /// Where patches are asked for, and where tests take them back.
    private static let asking = Result {
        try SwiftSource.all(under: "Sources").flatMap { $0.hits(#/\bSeriesPatch\.\w+\.isUndone\b/#) }
    }
    private static let tests = Result {
        try SwiftSource.all(under: "Tests/CoreTests").flatMap { $0.hits(#/\bcheckPatch\(\d+/#) }
    }

    @Test(arguments: SeriesPatch.allCases)
    func `a patch that can be taken back is asked for in one place, and its test takes it back`(
        _ patch: SeriesPatch
    ) throws {
        let asking = try Self.asking.get()
        #expect(asking.filter { $0.contains("SeriesPatch.\(patch).isUndone") }.count == 1)
        let tests = try Self.tests.get()
        #expect(
            tests.contains {
                $0.contains("checkPatch(\(patch.rawValue))") || $0.contains("checkPatch(\(patch.rawValue),")
            })
    }
}
