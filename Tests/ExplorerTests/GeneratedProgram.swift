import Explorer
import SeededRandom
import Synchrony

/// A small concurrent program over words and locks, made from a seed. Everything that it does shows in its end state: the
/// words, and what each task read.
final class GeneratedProgram: Subject {
    indirect enum Operation {
        case read(Int)
        case write(Int, UInt64)
        /// Adds without looking: commutes with itself.
        case add(Int, UInt64)
        /// Reads and changes at once.
        case update(Int)
        /// Reads, and stores what it read plus one in a second step: loses updates.
        case bump(Int)
        case locked(Int, [Operation])
        case tried(Int, [Operation])
        case readLocked([Operation])
        case writeLocked([Operation])
        /// Touches a word that only holders of the lock touch, unannounced.
        case hidden(Int)
        case waitForWord(Int)
        case sleepForWord(Int)
        case setAndWake(Int)
    }

    let tasks: [[Operation]]
    static let wordCount = 2
    private var words = [UInt64](repeating: 0, count: 2)
    private var hidden = [UInt64](repeating: 0, count: 2)
    private var logs: [[UInt64]] = []
    private var identities: [ObjectIdentity] = []
    private var locks: [SpinLock] = []
    private var shared = ReadWriteLock(.mmu, spinning: true)
    private var queue = SleepQueue()

    init(tasks: [[Operation]]) { self.tasks = tasks }

    override func taskCount(_ phase: Int) -> Int { tasks.count }

    override func begin() {
        words = [0, 0]
        hidden = [0, 0]
        logs = Array(repeating: [], count: tasks.count)
        identities = [ObjectIdentity(), ObjectIdentity()]
        locks = [SpinLock(.pageTable), SpinLock(.zone)]
        shared = ReadWriteLock(.mmu, spinning: true)
        queue = SleepQueue()
        tryLocks = [SleepingLock(.slots), SleepingLock(.mmap)]
    }

    override func runTask(_ phase: Int, _ task: Int) { for operation in tasks[task] { run(operation, task) } }

    var endState: [UInt64] { words + hidden + logs.flatMap { [UInt64.max] + $0 } }

    private func run(_ operations: [Operation], _ task: Int) { for operation in operations { run(operation, task) } }

    private func load(_ word: Int) -> UInt64 {
        schedulingPoint(.atomicLoad, identities[word].value)
        return words[word]
    }

    private func store(_ word: Int, _ value: UInt64) {
        schedulingPoint(.atomicStore, identities[word].value)
        words[word] = value
    }

    private func run(_ operation: Operation, _ task: Int) {
        switch operation {
        case .read(let word): logs[task].append(load(word))
        case .write(let word, let value): store(word, value)
        case .add(let word, let value):
            schedulingPoint(.atomicAccumulate, identities[word].value)
            words[word] &+= value
        case .update(let word):
            schedulingPoint(.atomicUpdate, identities[word].value)
            logs[task].append(words[word])
            words[word] = words[word] &* 3 &+ UInt64(task + 1)
        case .bump(let word):
            let old = load(word)
            store(word, old &+ 1)
        case .hidden(let word):
            logs[task].append(hidden[word])
            hidden[word] = hidden[word] &* 5 &+ UInt64(task + 1)
        default: runWaiting(operation, task)
        }
    }

    private func runWaiting(_ operation: Operation, _ task: Int) {
        switch operation {
        case .locked(let lock, let body):
            locks[lock].lock()
            run(body, task)
            locks[lock].unlock()
        case .tried(let lock, let body): runTried(lock, body, task)
        case .readLocked(let body):
            shared.lockForRead()
            run(body, task)
            shared.unlockRead()
        case .writeLocked(let body):
            shared.lockForWrite()
            run(body, task)
            shared.unlockWrite()
        case .waitForWord(let word):
            spinUntil(identities[word].value) { words[word] != 0 }
            logs[task].append(words[word])
        case .sleepForWord(let word): queue.wait { load(word) != 0 }
        case .setAndWake(let word):
            store(word, UInt64(task + 7))
            queue.wake()
        default: preconditionFailure("not a waiting operation")
        }
    }

    private var tryLocks: [SleepingLock] = []

    private func runTried(_ lock: Int, _ body: [Operation], _ task: Int) {
        guard tryLocks[lock].tryLock() else {
            logs[task].append(99)
            return
        }
        run(body, task)
        tryLocks[lock].unlock()
    }
}

/// Makes programs.
struct ProgramMaker {
    var random: SplitMix
    /// Operations of all tasks, counted as points at least.
    var left = 0

    mutating func program() -> GeneratedProgram {
        let count = Int.random(in: 2...3, using: &random)
        left = count == 2 ? 10 : 8
        return GeneratedProgram(
            tasks: (0..<count).map { _ in operations(Int.random(in: 1...3, using: &random), depth: 0) })
    }

    private mutating func operations(_ count: Int, depth: Int) -> [GeneratedProgram.Operation] {
        (0..<count).map { _ in operation(depth) }
    }

    private mutating func operation(_ depth: Int) -> GeneratedProgram.Operation {
        let word = Int.random(in: 0..<GeneratedProgram.wordCount, using: &random)
        left -= 1
        switch Int.random(in: 0..<(depth == 0 && left > 0 ? 16 : 6), using: &random) {
        case 0: return .read(word)
        case 1: return .write(word, UInt64.random(in: 1...3, using: &random))
        case 2: return .add(word, UInt64.random(in: 1...3, using: &random))
        case 3: return .update(word)
        case 4: return .bump(word)
        case 5: return depth > 0 ? .hidden(0) : .read(word)
        case 6, 7: return .locked(0, nested())
        case 8: return .locked(0, [.hidden(0)] + nested())
        case 9: return .tried(word, nested())
        case 10: return .readLocked([.read(word)] + nested())
        case 11: return .writeLocked(nested())
        case 12: return .waitForWord(word)
        case 13: return .sleepForWord(word)
        case 14: return .setAndWake(word)
        default:
            return .locked(word, [.locked(1 - word, [.update(word)])])
        }
    }

    private mutating func nested() -> [GeneratedProgram.Operation] {
        left -= 1
        // `hidden` is guarded by lock 0 alone.
        return operations(1, depth: 1).map { if case .hidden = $0 { .update(0) } else { $0 } }
    }
}
