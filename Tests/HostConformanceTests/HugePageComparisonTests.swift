#if os(Linux)
    import Foundation
    import Frames
    import Glibc
    import Machine
    import SeededRandom
    import Testing

    @testable import HostConformance
    @testable import HostMemory

    /// Huge pages of anonymous memory beside the kernel's, in this process: what `conform host` leaves out, because its
    /// window is smaller than one. Answers, bytes, which pages are there or guarded, and how many 2 MiB blocks are one page.
    @Suite(.serialized) struct HostConformance_HugePages {
        private static let blocks = 4
        private static let pages = blocks * 512
        private static let window = RealWindow(base: UserAddress(0x2000_0000_0000))
        private static let base = window.base

        enum Call {
            case map(Range<Int>, Protection)
            case unmap(Range<Int>)
            case protect(Range<Int>, Protection)
            case advise(Range<Int>, Advice)
            case load(Int)
            case store(Int, UInt64)
        }

        struct View: Equatable {
            var present: Set<Int> = []
            var guarded: Set<Int> = []
            var hugeBlocks = 0
        }

        /// Nil: they can be compared.
        private static let reason: String? = {
            let path = "/sys/kernel/mm/transparent_hugepage/enabled"
            do {
                let setting = try RealWindow.text(path)
                return setting.contains("[madvise]") ? nil : "\(path) is not madvise, which these sequences are for"
            } catch {
                return "this kernel has no transparent huge pages: \(error)"
            }
        }()

        // MARK: The kernel's side

        private static func real(_ call: Call) -> String {
            switch call {
            case .map(let pages, let protection): return window.map(pages, protection)
            case .unmap(let pages):
                return RealWindow.answer(failed: munmap(window.place(pages.lowerBound), pages.count << 12) != 0)
            case .protect(let pages, let protection):
                let failed = mprotect(
                    window.place(pages.lowerBound), pages.count << 12, RealWindow.bits(protection))
                return RealWindow.answer(failed: failed != 0)
            case .advise(let pages, let advice): return window.advise(pages, advice)
            case .load(let page): return "\(window.place(page)?.load(as: UInt64.self) ?? 0)"
            case .store(let page, let value):
                window.place(page)?.storeBytes(of: value, as: UInt64.self)
                return "\(value)"
            }
        }

        private static func realView() throws -> View {
            var view = View()
            for (page, entry) in try window.pagemap(pages).enumerated() {
                if entry >> 63 & 1 == 1 { view.present.insert(page) }
                if entry >> 58 & 1 == 1 { view.guarded.insert(page) }
            }
            var isInside = false
            for line in try RealWindow.text("/proc/self/smaps").split(separator: "\n") {
                if line.first?.isUppercase == false {
                    let low = line.split(separator: "-").first.flatMap { UInt64($0, radix: 16) } ?? 0
                    isInside = low >= base.value && low < base.value + UInt64(pages) * pageSize
                } else if isInside, line.hasPrefix("AnonHugePages:") {
                    let size = line.split(separator: " ").dropFirst().first.flatMap { Int($0) } ?? 0
                    view.hugeBlocks += size / 2048
                }
            }
            return view
        }

        // MARK: The model's side

        private final class Model {
            let arena: MappedArena
            let host: HostMemory.Host
            let space: AddressSpace

            init() throws {
                arena = try #require(MappedArena(size: 16384 << 12))
                let memory = PhysicalMemory(arena: arena.base, ramFrames: 16384, arenaIsZero: true)
                host = HostMemory.Host(memory: memory, transparentHugePages: false)
                space = AddressSpace(host: host)
            }

            deinit { space.exit() }

            private func range(_ pages: Range<Int>) -> Range<UserAddress> {
                base + UInt64(pages.lowerBound) * pageSize..<base + UInt64(pages.upperBound) * pageSize
            }

            /// Nil: a signal.
            func perform(_ call: Call) -> String? {
                do throws(Errno) {
                    switch call {
                    case .map(let pages, let protection):
                        try space.map(
                            at: range(pages).lowerBound, length: UInt64(pages.count) * pageSize, protection: protection,
                            backing: .anonymous)
                    case .unmap(let pages): try space.unmap(range(pages))
                    case .protect(let pages, let protection): try space.protect(range(pages), protection)
                    case .advise(let pages, let advice): try space.advise(range(pages), advice)
                    case .load(let page): return access(page, nil)
                    case .store(let page, let value): return access(page, value)
                    }
                    return "0"
                } catch {
                    return "\(error)"
                }
            }

            private func access(_ page: Int, _ value: UInt64?) -> String? {
                do throws(UserFault) {
                    return "\(try space.access(base + UInt64(page) * pageSize, store: value))"
                } catch {
                    return nil
                }
            }

            func view() -> View {
                var view = View()
                for page in 0..<pages {
                    let address = base + UInt64(page) * pageSize
                    let state = space.pageMapEntry(address)
                    if state.isPresent { view.present.insert(page) }
                    if state.isGuard { view.guarded.insert(page) }
                    if page % 512 == 0, let leaf = space.leaf(address), leaf.entry.isLargeLeaf, !leaf.entry.isSpecial {
                        view.hugeBlocks += 1
                    }
                }
                return view
            }
        }

        /// The first difference. Khugepaged and a lack of huge pages may get in between once.
        private static func difference(_ calls: [Call]) throws -> String? {
            var found: String?
            for _ in 0..<3 {
                found = try play(calls)
                if found == nil { return nil }
            }
            return found
        }

        private static func play(_ calls: [Call]) throws -> String? {
            munmap(window.place(0), pages << 12)
            defer { munmap(window.place(0), pages << 12) }
            let model = try Model()
            var done: [Call] = []
            for call in calls {
                done.append(call)
                guard let expected = model.perform(call) else { continue }
                let answer = real(call)
                let program = done.map { "\n  \($0)" }.joined()
                if answer != expected { return "the model answers \(expected), the kernel \(answer), after\(program)" }
                let (modelled, seen) = (model.view(), try realView())
                if modelled.hugeBlocks != seen.hugeBlocks {
                    return "huge blocks: model \(modelled.hugeBlocks), kernel \(seen.hugeBlocks), after\(program)"
                }
                if modelled != seen {
                    let pages = modelled.present.symmetricDifference(seen.present).sorted()
                    return "present, in one of the two only: \(pages), or guards, after\(program)"
                }
            }
            return nil
        }

        // MARK: Tests

        @Test(
            .enabled(if: reason == nil, Comment(rawValue: reason ?? "")),
            arguments: [
                // Nothing written, little written, all of it already.
                [
                    Call.map(0..<1024, .readWrite), .advise(0..<512, .collapse), .store(5, 7),
                    .advise(0..<512, .collapse), .load(5), .load(6), .advise(0..<512, .collapse),
                    .advise(0..<1, .collapse), .advise(1..<2, .collapse), .advise(1..<513, .collapse),
                    .advise(1..<1025, .collapse),
                ],
                // Where it can't be.
                [
                    .map(1..<513, .readWrite), .store(3, 1), .advise(1..<512, .collapse), .advise(1..<2, .collapse),
                    .unmap(1..<513), .map(1..<1025, .readWrite), .store(3, 1), .advise(1..<513, .collapse),
                    .advise(1..<1025, .collapse), .store(600, 1), .advise(1..<1025, .collapse),
                    .advise(512..<1024, .noHugePage), .advise(512..<1024, .collapse),
                ],
                // Rights, holes, and what is in the way.
                [
                    .map(0..<512, .readWrite), .store(0, 1), .protect(0..<1, .read), .advise(0..<512, .collapse),
                    .protect(0..<512, .read), .advise(0..<512, .collapse), .load(0), .protect(0..<512, .none),
                    .map(513..<1024, .readWrite), .advise(0..<1024, .collapse),
                ],
                [
                    .map(0..<512, .readWrite), .store(9, 1), .advise(2..<3, .guardInstall), .advise(0..<512, .collapse),
                    .advise(2..<3, .guardRemove), .advise(0..<512, .collapse), .load(9), .load(2),
                ],
                // Split by what touches a part.
                [
                    .map(0..<1536, .readWrite), .advise(0..<1536, .hugePage), .store(1, 1), .store(513, 2),
                    .store(1025, 3), .advise(7..<8, .dontNeed), .protect(600..<700, .read), .unmap(1030..<1040),
                    .load(1), .load(7), .load(513), .load(1025), .advise(0..<512, .collapse), .load(8),
                ],
                // A read of nothing, and a write to it.
                [
                    .map(0..<1024, .readWrite), .advise(0..<1024, .hugePage), .load(3), .load(600), .store(4, 1),
                    .load(3), .advise(600..<601, .dontNeed), .load(599), .load(600), .store(601, 2), .load(602),
                    .advise(0..<512, .collapse),
                ],
                // A read-only mapping of zeros.
                [
                    .map(0..<512, .read), .load(3), .advise(0..<512, .collapse), .protect(0..<512, .readWrite),
                    .store(3, 3), .advise(0..<512, .free), .advise(0..<512, .collapse), .load(3),
                ],
            ])
        func `a written sequence comes out as in the kernel`(calls: [Call]) throws {
            if let difference = try Self.difference(calls) { Issue.record("\(difference)") }
        }

        @Test(.enabled(if: reason == nil, Comment(rawValue: reason ?? "")), arguments: 1...25)
        func `a random sequence comes out as in the kernel`(seed: Int) throws {
            var random = SplitMix(seed: UInt64(seed))
            let calls = (0..<24).map { _ in Self.draw(&random) }
            if let difference = try Self.difference(calls) { Issue.record("seed \(seed): \(difference)") }
        }

        private static func draw(_ random: inout SplitMix) -> Call {
            func below(_ bound: Int) -> Int { Int.random(in: 0..<bound, using: &random) }
            // Whole blocks, and parts of them.
            let first = below(blocks) * 512 + (below(2) == 0 ? 0 : below(512))
            let count = below(2) == 0 ? 512 * (1 + below(3)) : 1 + below(600)
            let range = first..<min(first + count, pages)
            let protection: Protection = [.readWrite, .readWrite, .readWrite, .read, .none][below(5)]
            switch below(20) {
            case 0..<4: return .map(range, protection)
            case 4: return .unmap(range)
            case 5, 6: return .protect(range, protection)
            case 7..<9: return .advise(range, .hugePage)
            case 9..<11: return .advise(range, .collapse)
            case 11: return .advise(range, [.dontNeed, .noHugePage, .guardInstall, .guardRemove][below(4)])
            case 12..<15: return .load(range.lowerBound)
            default: return .store(range.lowerBound, UInt64(below(1000)))
            }
        }
    }
#endif
