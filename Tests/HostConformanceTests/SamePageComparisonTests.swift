#if os(Linux)
    import Foundation
    import Frames
    import Glibc
    import Machine
    import Testing

    @testable import HostMemory

    /// Merging of equal pages beside the kernel's, in this process: what is merged, what a write and MADV_UNMERGEABLE make of
    /// it, and the bytes. For seconds the kernel then merges for all processes, so the test wants to be asked for, by
    /// FAULTLINE_KSM=1, and root; the settings are as before afterwards.
    @Suite(.serialized) struct HostConformance_SamePages {
        private static let folder = "/sys/kernel/mm/ksm/"
        private static let pages = 32
        private let window = RealWindow(base: UserAddress(0x3000_0000_0000))

        /// Nil: they can be compared.
        private static let reason: String? = {
            guard ProcessInfo.processInfo.environment["FAULTLINE_KSM"] == "1" else {
                return "it lets the kernel merge pages of all processes; FAULTLINE_KSM=1 asks for it"
            }
            guard access(folder + "run", W_OK) == 0 else { return "\(folder)run can't be written" }
            do {
                let running = try number("run")
                return running == 0 ? nil : "somebody else has pages merged"
            } catch { return "\(error)" }
        }()

        private static func number(_ name: String) throws -> Int {
            let text = try RealWindow.text(folder + name).trimmingCharacters(in: .whitespacesAndNewlines)
            return try #require(Int(text))
        }

        private static func set(_ name: String, _ value: Int) throws {
            let file = try FileHandle(forWritingTo: URL(filePath: folder + name))
            try file.write(contentsOf: Data("\(value)".utf8))
        }

        /// Lets the kernel look at everything so often that it has merged what it can.
        private static func mergeForReal() throws {
            let wanted = ["sleep_millisecs": 1, "pages_to_scan": 1000, "smart_scan": 0]
            let before = try wanted.keys.map { ($0, try number($0)) }
            let scans = try number("full_scans")
            defer {
                for (name, value) in before + [("run", 0)] {
                    do { try set(name, value) } catch {
                        Issue.record("\(folder)\(name) is not \(value) again: \(error)")
                    }
                }
            }
            for (name, value) in wanted { try set(name, value) }
            try set("run", 1)
            for _ in 0..<1000 {
                if try number("full_scans") >= scans + 4 { return }
                usleep(10_000)
            }
            Issue.record("the kernel did not look at all pages in 10 seconds")
        }

        private enum Call {
            case store(Int, UInt64)
            case advise(Range<Int>, Advice)
            case merge
        }

        @Test(.enabled(if: reason == nil, Comment(rawValue: reason ?? "")))
        func `the same pages are merged, and part again, as in the kernel`() throws {
            let arena = try #require(MappedArena(size: 1024 << 12))
            let memory = PhysicalMemory(arena: arena.base, ramFrames: 1024, arenaIsZero: true)
            let host = HostMemory.Host(memory: memory, transparentHugePages: false, reclaims: true)
            let space = AddressSpace(host: host)
            defer {
                space.exit()
                munmap(window.place(0), Self.pages << 12)
            }
            func address(_ page: Int) -> UserAddress { window.base + UInt64(page) * pageSize }
            #expect(window.map(0..<Self.pages, .readWrite) == "0")
            try space.map(
                at: address(0), length: UInt64(Self.pages) * pageSize, protection: .readWrite, backing: .anonymous)
            // Some stay mergeable to the end: with none the kernel would not scan.
            // Equal ones, different ones, and equal ones outside of what may be merged.
            var calls: [Call] = [.advise(0..<Self.pages, .noHugePage), .advise(0..<20, .mergeable)]
            calls += (0..<8).map { .store($0, 5) } + (8..<12).map { .store($0, UInt64(100 + $0)) }
            calls += (12..<16).map { .store($0, 0) } + (16..<24).map { .store($0, 5) }
            calls += [.merge, .store(3, 6), .store(13, 9), .merge, .store(4, 6), .merge, .advise(0..<4, .unmergeable)]
            calls += [.advise(5..<6, .dontNeed), .merge, .store(7, 5), .advise(0..<18, .unmergeable), .merge]
            var merged = 0
            // Nobody else's pages are equal to these.
            let tag = UInt64.random(in: 1...UInt64.max)
            for page in 0..<Self.pages {
                try space.store(address(page) + 8, tag)
                window.place(page)?.storeBytes(of: tag, toByteOffset: 8, as: UInt64.self)
            }
            for (step, call) in calls.enumerated() {
                switch call {
                case .store(let page, let value):
                    try space.store(address(page), value)
                    window.place(page)?.storeBytes(of: value, as: UInt64.self)
                case .advise(let range, let advice):
                    try space.advise(address(range.lowerBound)..<address(range.upperBound), advice)
                    #expect(window.advise(range, advice) == "0")
                case .merge:
                    merged += host.mergeSamePages()
                    try Self.mergeForReal()
                }
                for (page, entry) in try window.pagemap(Self.pages).enumerated() {
                    let state = space.pageMapEntry(address(page))
                    #expect(state.isPresent == (entry >> 63 & 1 == 1), "step \(step): \(call), page \(page)")
                    #expect(state.isExclusive == (entry >> 56 & 1 == 1), "step \(step): \(call), page \(page)")
                }
            }
            #expect(merged >= 12)
            for page in 0..<Self.pages where page != 5 {
                #expect(try space.load(address(page)) == window.place(page)?.load(as: UInt64.self))
            }
        }
    }
#endif
