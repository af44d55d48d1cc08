import CBenchmarkLimits
import Foundation
import Frames
import GuestMemory
import HostMemory
import Paging
import Synchronization

extension BenchmarkMachine {
    /// One guest write fault for each of `order`, by the vCPU `number`: what its task does between the guest's exit and its
    /// next entry. Returns how many installed an entry.
    func fault(_ order: UnsafeBufferPointer<UInt32>, by number: Int = 0) -> Int {
        lending(cpus[number]) { cpu in
            lending(mmu) { mmu in
                lending(vm.slotReaders) { slots in
                    var fixed = 0
                    for page in order {
                        let fault = GuestFault(
                            address: GuestAddress(UInt64(page) << pageShift), access: .write, entryPresent: false)
                        let section = slots.enter()
                        if case .fixed = mmu.handleFault(cpu, fault) { fixed += 1 }
                        slots.exit(section)
                    }
                    return fixed
                }
            }
        }
    }

    /// The faults of `orders`, each by a vCPU on a thread of its own; all begin at once. Nanoseconds until the last is done,
    /// and how many installed an entry.
    func faultInParallel(_ orders: [UnsafeBufferPointer<UInt32>]) -> (nanoseconds: Double, fixed: Int) {
        let race = ParallelFaults(self, orders)
        for number in orders.indices { Thread.detachNewThread { race.run(number) } }
        return race.result
    }
}

/// Threads that begin at once.
private final class ParallelFaults: @unchecked Sendable {
    // Unchecked: the orders and the machine never change; each thread writes its own counters before it signals.
    private let machine: BenchmarkMachine
    private let orders: [UnsafeBufferPointer<UInt32>]
    private let waiting: Atomic<Int>
    private let fixed = Atomic<Int>(0)
    private let done = DispatchSemaphore(value: 0)
    private let times: UnsafeMutablePointer<(begin: ContinuousClock.Instant, end: ContinuousClock.Instant)>

    init(_ machine: BenchmarkMachine, _ orders: [UnsafeBufferPointer<UInt32>]) {
        self.machine = machine
        self.orders = orders
        waiting = Atomic(orders.count)
        times = .allocate(capacity: orders.count)
    }

    deinit { times.deallocate() }

    func run(_ number: Int) {
        waiting.subtract(1, ordering: .sequentiallyConsistent)
        while waiting.load(ordering: .acquiring) > 0 {}
        let begin = ContinuousClock.now
        let count = machine.fault(orders[number], by: number)
        times[number] = (begin, ContinuousClock.now)
        fixed.add(count, ordering: .relaxed)
        done.signal()
    }

    var result: (nanoseconds: Double, fixed: Int) {
        for _ in orders { done.wait() }
        var (begin, end) = times[0]
        for i in orders.indices {
            begin = min(begin, times[i].begin)
            end = max(end, times[i].end)
        }
        let (seconds, attoseconds) = (end - begin).components
        return (Double(seconds) * 1e9 + Double(attoseconds) / 1e9, fixed.load(ordering: .relaxed))
    }
}

/// What one fault does, seen instruction by instruction.
public struct FaultAnatomy: Sendable, Codable {
    public var instructions: Int
    /// Read-modify-writes, each of which locks a line.
    public var atomics: Int
    /// Lines that the faults of two vCPUs, on pages far apart, both lock.
    public var sharedLines: Int
}

extension BenchmarkMachine {
    private final class Step {
        let machine: BenchmarkMachine
        let page: UInt32
        let number: Int
        var fixed = 0
        init(_ machine: BenchmarkMachine, _ page: UInt32, _ number: Int) {
            self.machine = machine
            self.page = page
            self.number = number
        }
        func run() {
            withUnsafePointer(to: page) { page in
                fixed = machine.fault(UnsafeBufferPointer(start: page, count: 1), by: number)
            }
        }
    }

    /// The fault on `page`, after one on the next page has made the thread's own things.
    private static func step(_ machine: BenchmarkMachine, _ page: UInt32, _ number: Int) -> limit_steps? {
        var steps = limit_steps()
        Step(machine, page + 1, number).run()
        let step = Step(machine, page, number)
        let failed = limit_step(
            { Unmanaged<Step>.fromOpaque($0!).takeUnretainedValue().run() }, Unmanaged.passUnretained(step).toOpaque(),
            &steps)
        return failed == 0 && step.fixed == 1 ? steps : nil
    }

    /// Two vCPUs, each on a thread of its own, each with a fault on an unmapped page whose tables are there, step by step.
    /// Nil: this machine can't be stepped, or a fault installed nothing.
    func anatomy() -> FaultAnatomy? {
        let pages = [UInt32(0), UInt32(pages - 2)]
        let seen = pages.indices.map { number in
            let box = AnatomyBox()
            let done = DispatchSemaphore(value: 0)
            // One after the other: only their lines are compared.
            let run = UncheckedMachine(machine: self)
            Thread.detachNewThread {
                box.steps = Self.step(run.machine, pages[number], number)
                done.signal()
            }
            done.wait()
            return box.steps
        }
        guard let first = seen[0], let second = seen[1] else { return nil }
        let lines = seen.map { steps in
            withUnsafeBytes(of: steps!.line) { Set($0.bindMemory(to: UInt64.self).prefix(Int(steps!.lines))) }
        }
        return FaultAnatomy(
            instructions: Int(first.instructions), atomics: Int(max(first.locked, second.locked)),
            sharedLines: lines[0].intersection(lines[1]).count)
    }
}

/// What a thread leaves for the one that waits for it.
private final class AnatomyBox: @unchecked Sendable {
    // Unchecked: written by one thread before it signals, read by the other after it has waited.
    var steps: limit_steps?
}

private struct UncheckedMachine: @unchecked Sendable {
    // Unchecked: the thread that made it waits meanwhile.
    let machine: BenchmarkMachine
}
