import CBenchmarkLimits
import Foundation
import Frames
import GuestMemory
import HostMemory
import Paging
import Synchronization
import Synchrony

/// What a fault needs, at hand: no reference to any of it is counted while faults run. The machine outlives it.
struct FaultRun: @unchecked Sendable {
    // Unchecked: constant pointers to objects that tasks share.
    let mmu: Unmanaged<TDPMMU>
    let cpu: Unmanaged<VirtualCPU>
    let slots: Unmanaged<ReadSideSections>

    /// One guest write fault for each of `order`: what the vCPU's task does between the guest's exit and its next entry.
    /// Returns how many installed an entry.
    func faults(_ order: UnsafeBufferPointer<UInt32>) -> Int {
        mmu._withUnsafeGuaranteedRef { mmu in
            cpu._withUnsafeGuaranteedRef { cpu in
                slots._withUnsafeGuaranteedRef { slots in
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
}

extension BenchmarkMachine {
    /// The faults of vCPU `number`.
    func run(by number: Int) -> FaultRun {
        FaultRun(
            mmu: Unmanaged.passUnretained(mmu), cpu: Unmanaged.passUnretained(cpus[number]),
            slots: Unmanaged.passUnretained(vm.slotReaders))
    }

    func fault(_ order: UnsafeBufferPointer<UInt32>) -> Int { run(by: 0).faults(order) }

    /// The faults of `orders`, each by a vCPU on a thread of its own.
    func faultInParallel(_ orders: [UnsafeBufferPointer<UInt32>]) -> ParallelWork.Result {
        ParallelWork.run(
            orders.indices.map { number in
                let faults = run(by: number)
                nonisolated(unsafe) let order = orders[number]
                return { faults.faults(order) }
            })
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
        let faults: FaultRun
        let page: UInt32
        var fixed = 0
        init(_ faults: FaultRun, _ page: UInt32) {
            self.faults = faults
            self.page = page
        }
        func run() {
            withUnsafePointer(to: page) { page in
                fixed = faults.faults(UnsafeBufferPointer(start: page, count: 1))
            }
        }
    }

    /// The fault on `page`, one instruction at a time, after one on the next page has made the thread's own things.
    private static func step(_ faults: FaultRun, _ page: UInt32) -> limit_steps? {
        var steps = limit_steps()
        Step(faults, page + 1).run()
        let step = Step(faults, page)
        let failed = limit_step(
            { Unmanaged<Step>.fromOpaque($0!)._withUnsafeGuaranteedRef { $0.run() } },
            Unmanaged.passUnretained(step).toOpaque(), &steps)
        return failed == 0 && step.fixed == 1 ? steps : nil
    }

    /// The lines that `steps` has locked.
    private static func lines(of steps: limit_steps) -> Set<UInt64> {
        withUnsafeBytes(of: steps.line) { Set($0.bindMemory(to: UInt64.self).prefix(Int(steps.lines))) }
    }

    /// Two vCPUs, each on a thread of its own, each with a fault on an unmapped page whose tables are there, step by step.
    /// Nil: this machine can't be stepped, or a fault installed nothing.
    func anatomy() -> FaultAnatomy? {
        let pages = [UInt32(0), UInt32(pages - 2)]
        // A thread that ends leaves its line of the readers' to the next one.
        let end = DispatchSemaphore(value: 0)
        let seen = pages.indices.map { number in
            let box = AnatomyBox()
            let done = DispatchSemaphore(value: 0)
            // One after the other: only their lines are compared.
            let run = run(by: number)
            Thread.detachNewThread {
                box.steps = Self.step(run, pages[number])
                done.signal()
                end.wait()
            }
            done.wait()
            return box.steps
        }
        for _ in pages { end.signal() }
        guard let first = seen[0], let second = seen[1] else { return nil }
        return FaultAnatomy(
            instructions: Int(first.instructions), atomics: Int(first.locked),
            sharedLines: Self.lines(of: first).intersection(Self.lines(of: second)).count)
    }
}

/// What a thread leaves for the one that waits for it.
private final class AnatomyBox: @unchecked Sendable {
    // Unchecked: written by one thread before it signals, read by the other after it has waited.
    var steps: limit_steps?
}
