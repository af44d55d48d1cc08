import Foundation
import Frames
import HostMemory
import Testing

@Suite struct WritingADriver {
    let test = TestHost(ramFrames: 256)

    @Test func `the example maps its pages, and takes them away`() throws {
        let space = test.space()
        let leaked = try test.leaked {
            let mailbox = try #require(Mailbox(test.host))
            #expect(throws: Errno.EINVAL) { try space.mapPages(4, 3, .driver(mailbox)) }
            #expect(throws: Errno.EINVAL) { try space.mapPages(4, 1, .driver(mailbox, shared: false)) }
            try space.mapPages(0, 2, .driver(mailbox))
            try space.store(at(1, 8), 7)
            #expect(try space.load(at(1, 8)) == 7)
            mailbox.close()
            #expect(throws: Errno.EFAULT) { try space.load(at(1, 8)) }
            #expect(mailbox.claimedFrames.isEmpty)
            space.exit()
        }
        // The page tables of the process.
        #expect(leaked <= 0)
        #expect(test.journal.findings.isEmpty)
    }

    @Test func `the page of the documentation shows the example as it is compiled`() throws {
        let source = try text("Tests/CoreTests/HostMemory/ExampleDriver.swift")
        let parts = source.components(separatedBy: "// begin example\n")
        let example = try #require(parts.last?.components(separatedBy: "// end example").first)
        #expect(try text("Documentation/Faultline.docc/WritingADriver.md").contains("```swift\n\(example)```"))
    }

    private func text(_ path: String) throws -> String {
        var root = URL(filePath: #filePath)
        for _ in 0..<4 { root.deleteLastPathComponent() }
        return try String(contentsOf: root.appending(path: path), encoding: .utf8)
    }
}
