// TypeRuleTests: the rules that are types. For each row of the design's table "Rules as types" stand, in `Snippets`,
// programs that break it and must not compile, each beside its correction, which must. What a type can't hold traps or
// is reported by the journal: `TrapTests` and `JournalTests`. What not even that can hold is a rule about the sources
// themselves: `SourceRules`.
//
// Each wrong snippet marks the line at which it must be refused: `// error: <part of the diagnostic>`.

import Testing

@Suite struct I1_DroppedExactlyOnce {
    @Test(arguments: try SnippetPair.all(in: .droppedOnce))
    func `a page reference is released exactly once`(_ pair: SnippetPair) throws { try pair.check() }
}

@Suite struct I3_PutOrUnpinned {
    @Test(arguments: try SnippetPair.all(in: .putOrUnpinned))
    func `a reference is put and a pin is unpinned`(_ pair: SnippetPair) throws { try pair.check() }
}

@Suite struct I8_SnapshotBeforeTranslate {
    @Test(arguments: try SnippetPair.all(in: .snapshot))
    func `the snapshot is older than the translation, and that very one is checked`(_ pair: SnippetPair) throws {
        try pair.check()
    }
}

@Suite struct I6_NoFrameWithoutTheCheck {
    @Test(arguments: try SnippetPair.all(in: .permit))
    func `a frame is mapped with a permit, under the lock that gave it`(_ pair: SnippetPair) throws {
        try pair.check()
    }
}

@Suite struct I7_AnUpdateSpellsNoFrame {
    @Test(arguments: try SnippetPair.all(in: .update))
    func `an update of an entry can't name a frame`(_ pair: SnippetPair) throws { try pair.check() }
}

@Suite struct I10_MarkedUnderTheLock {
    @Test(arguments: try SnippetPair.all(in: .underLock))
    func `a fault's page is marked under mmu_lock only`(_ pair: SnippetPair) throws { try pair.check() }
}

@Suite struct I4_NoPageFromAnEntry {
    @Test(arguments: try SnippetPair.all(in: .noPage))
    func `no page frame is reached from a frame number`(_ pair: SnippetPair) throws { try pair.check() }
}

@Suite struct I18_ErrorsAreNotFrames {
    @Test(arguments: try SnippetPair.all(in: .errors))
    func `an error value never reaches an entry`(_ pair: SnippetPair) throws { try pair.check() }
}

@Suite struct I24_CachedBytesUnderTheLock {
    @Test(arguments: try SnippetPair.all(in: .cachedBytes))
    func `a frame cache's bytes are used after a check and under its lock`(_ pair: SnippetPair) throws {
        try pair.check()
    }
}

/// That the snippets are all there, and that none is left out of the suites above.
@Suite struct SnippetCollection {
    @Test func `every folder is a row of the table`() throws {
        #expect(try Row.foldersOnDisk() == Row.allCases.map(\.rawValue))
    }

    @Test(arguments: Row.allCases)
    func `every wrong program has its correction`(_ row: Row) throws {
        let names = try row.snippetNames()
        #expect(!names.wrong.isEmpty)
        #expect(names.wrong == names.right)
    }

    @Test(arguments: Row.allCases)
    func `every wrong program marks where it is wrong, and no correction does`(_ row: Row) throws {
        for pair in try SnippetPair.all(in: row) {
            #expect(!pair.wrong.markers.isEmpty, "\(pair.name)")
            #expect(pair.right.markers.isEmpty, "\(pair.name)")
        }
    }
}
