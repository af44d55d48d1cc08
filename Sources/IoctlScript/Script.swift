/// A script, read and resolved.
public struct Script: Sendable, Equatable {
    public struct Line: Sendable, Equatable {
        /// In the file, from 1.
        public var number: Int
        /// Who calls; 0 is the process that the script begins in.
        public var process: Int
        public var step: Step
        public init(number: Int, process: Int = 0, _ step: Step) {
            self.number = number
            self.process = process
            self.step = step
        }
    }
    public var lines: [Line]
    public var names: Names
    public init(lines: [Line], names: Names) {
        self.lines = lines
        self.names = names
    }
}

/// The names of what a script makes, by number.
public struct Names: Sendable, Equatable {
    public var regions: [String] = []
    public var memfds: [String] = []
    public var vms: [String] = []
    public var processes = ["main"]
    /// The identities of the vCPUs that a `vcpu` line makes, by VM.
    public var cpus: [[UInt64]] = []
    public init() {}
}

/// Whoever can do what a script says: the model, or a kernel. It starts with nothing but one process.
public protocol Executor {
    /// Does one step; every step is done, in order, whatever came of those before.
    mutating func perform(_ step: Step, process: Int) -> Answer
}

extension Script {
    /// Runs it; one answer for each line.
    public func run(on executor: inout some Executor) -> [Answer] {
        lines.map { executor.perform($0.step, process: $0.process) }
    }

    /// Runs what another executor has run before. What that one could not do is not done, so that the two don't part; of a
    /// run that ended early there are as many answers.
    public func run(on executor: inout some Executor, beside other: [Answer]) -> [Answer] {
        zip(lines, other).map { line, answer in
            answer.isNotHere ? answer : executor.perform(line.step, process: line.process)
        }
    }
}
