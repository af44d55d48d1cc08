#if os(Linux)
    import Frames
    import Glibc
    import HostMemory
    import SeededRandom

    /// The same calls on the model and on this machine's kernel.
    public final class HostConformance {
        /// Where the two sides differ: after the last of `calls`.
        public struct Difference: Sendable {
            public var calls: [HostCall]
            /// What differs: the answer, or a page of a process.
            public var what: String
            public var model: String
            public var kernel: String
        }

        public struct Report: Sendable {
            public var steps = 0
            public var sequences = 0
            /// How often each call was made, and how often with each answer, by their names.
            public var histogram: [String: Int] = [:]
            public var difference: Difference?
            public init() {}
        }

        /// This machine can't be compared with: why.
        public struct Unavailable: Error { public let reason: String }

        /// Advices whose effect can't be foretold on this machine.
        private var impossible: [HostAdvice] {
            (real.hasSwap ? [] : [.pageOut])
                + (MachineSettings.showsGuards ? [] : [.guardInstall, .guardRemove])
        }

        private let model: ModelHost
        private let real: RealHost
        private static let stepsPerSequence = 60

        /// Whether both sides have a swap device: the real one is made for the purpose, where that is possible.
        public var hasSwap: Bool { real.hasSwap }

        /// The kernel that the model's host follows in what a process can see, and the oldest that can be compared with it:
        /// since 6.17 mremap moves several VMAs at once.
        private static let oldest = (major: 6, minor: 17)

        /// Kernel: `uname -r`.
        public static var kernelRelease: String {
            var name = utsname()
            guard uname(&name) == 0 else { return "unknown" }
            return withUnsafeBytes(of: &name.release) { bytes in
                String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
            }
        }

        public init() throws(Unavailable) {
            let release = Self.kernelRelease
            let numbers = release.split(whereSeparator: { !$0.isNumber }).prefix(2).compactMap { Int($0) }
            guard numbers.count == 2, (numbers[0], numbers[1]) >= Self.oldest else {
                throw Unavailable(
                    reason:
                        "this is Linux \(release); the model follows \(Self.oldest.major).\(Self.oldest.minor) and later"
                )
            }
            guard let real = RealHost() else { throw Unavailable(reason: "no processes can be started here") }
            guard let model = ModelHost(swaps: real.hasSwap) else {
                throw Unavailable(reason: "no memory for the model's host")
            }
            self.model = model
            self.real = real
        }

        /// Random sequences, `steps` calls in all; ends at the first difference, which is shrunk.
        /// - Parameter progress: called after each sequence with the steps so far; false stops.
        public func run(
            steps: Int, seed: UInt64, progress: (Int) -> Bool = { _ in true }
        ) throws(Unavailable) -> Report {
            var report = Report()
            var seeds = SplitMix(seed: seed)
            while report.steps < steps {
                var generator = Generator(seed: seeds.next(), without: impossible, secrets: real.hasSecret)
                var calls: [HostCall] = []
                for _ in 0..<min(Self.stepsPerSequence, steps - report.steps) { calls.append(generator.next()) }
                report.sequences += 1
                let difference = try play(calls) { call, answer in
                    report.steps += 1
                    report.histogram["\(Self.name(call)): \(Self.name(answer))", default: 0] += 1
                }
                if let difference {
                    report.difference = try shrink(difference)
                    return report
                }
                if !progress(report.steps) { return report }
            }
            return report
        }

        /// Plays calls from the beginning on both sides; the first difference, with the calls up to it. Calls of processes
        /// that don't run, and forks into ones that do, are left out.
        public func play(
            _ calls: [HostCall], each: (HostCall, HostAnswer) -> Void = { _, _ in }
        ) throws(Unavailable) -> Difference? {
            do throws(RealHost.Broken) {
                return try playBroken(calls, each)
            } catch {
                throw Unavailable(reason: error.reason)
            }
        }

        private func playBroken(
            _ calls: [HostCall], _ each: (HostCall, HostAnswer) -> Void
        ) throws(RealHost.Broken) -> Difference? {
            try real.begin()
            model.begin()
            var running = [true] + Array(repeating: false, count: ModelHost.mostProcesses - 1)
            var done: [HostCall] = []
            for call in calls {
                if let process = call.process, !running[process] { continue }
                if case .fork(_, let child) = call, running[child] { continue }
                done.append(call)
                let expected = try real.perform(call)
                let answer = model.perform(call)
                if answer != expected {
                    return Difference(
                        calls: done, what: "the answer", model: "\(answer)", kernel: "\(expected)")
                }
                each(call, answer)
                if case .fork(_, let child) = call, answer == .done { running[child] = true }
                if case .end(let process) = call { running[process] = false }
                for process in running.indices where running[process] {
                    if let difference = try compareWindow(process, done, areas: call.changesAreas) {
                        return difference
                    }
                }
            }
            let leaked = model.end()
            if leaked != 0 {
                return Difference(
                    calls: done, what: "memory in use after all have ended", model: "\(leaked) frames", kernel: "none")
            }
            return nil
        }

        private func compareWindow(
            _ process: Int, _ done: [HostCall], areas: Bool
        ) throws(RealHost.Broken) -> Difference? {
            let expected = try real.look(process, areas: areas)
            var found = model.look(process)
            for page in found.indices {
                if !areas { found[page].area = nil }
                if found[page] != expected[page] {
                    return Difference(
                        calls: done, what: "page[\(page)] of p\(process)", model: "\(found[page])",
                        kernel: "\(expected[page])")
                }
            }
            return nil
        }

        /// Fewer calls that still differ: chunks are left out as long as something differs.
        private func shrink(_ difference: Difference) throws(Unavailable) -> Difference {
            var best = difference
            var chunk = best.calls.count / 2
            while chunk >= 1 {
                var start = 0
                var improved = false
                while start < best.calls.count {
                    var fewer = best.calls
                    fewer.removeSubrange(start..<min(start + chunk, fewer.count))
                    if let other = try play(fewer) {
                        best = other
                        improved = true
                    } else {
                        start += chunk
                    }
                }
                if chunk == 1, !improved { break }
                chunk = max(1, chunk / 2)
            }
            return best
        }

        private static func name(_ call: HostCall) -> String {
            switch call {
            case .map(_, _, let kind, _):
                switch kind {
                case .anonymous: "mmap anonymous private"
                case .anonymousShared: "mmap anonymous shared"
                case .file(_, _, let shared): shared ? "mmap memfd shared" : "mmap memfd private"
                case .secret(_, let shared): shared ? "mmap memfd_secret shared" : "mmap memfd_secret private"
                }
            case .unmap: "munmap"
            case .protect: "mprotect"
            case .advise(_, _, let advice): "madvise \(advice.rawValue)"
            case .remap(_, let pages, let count, let target):
                target != nil ? "mremap move" : count > pages.count ? "mremap grow" : "mremap shrink"
            case .raw(_, let call): "\(call.name.rawValue) of any numbers"
            case .load: "load"
            case .store: "store"
            case .fork: "fork"
            case .end: "exit"
            case .truncate: "ftruncate"
            case .punchHole: "fallocate punch"
            case .readFile: "pread"
            case .writeFile: "pwrite"
            }
        }

        private static func name(_ answer: HostAnswer) -> String {
            if case .value = answer { return "value" }
            return "\(answer)"
        }
    }

    extension HostConformance.Difference: CustomStringConvertible {
        /// A program one can read, and both answers.
        public var description: String {
            let lines = calls.map { "  \($0)" }
            return (lines + ["\(what) differs", "  model   \(model)", "  kernel  \(kernel)"]).joined(separator: "\n")
        }
    }
#endif
