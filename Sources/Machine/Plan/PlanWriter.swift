import Frames

/// Appends a plan's parts to bytes. `PlanReader` reads them back; the two files stand line by line beside each other.
struct PlanWriter {
    var bytes: [UInt8] = []

    mutating func number(_ value: UInt64) {
        var rest = value
        while rest >= 0x80 {
            bytes.append(UInt8(truncatingIfNeeded: rest) | 0x80)
            rest >>= 7
        }
        bytes.append(UInt8(rest))
    }

    /// A count or an index: never negative.
    mutating func count(_ value: Int) {
        precondition(value >= 0, "a plan's counts are not negative")
        number(UInt64(value))
    }

    mutating func flag(_ value: Bool) { bytes.append(value ? 1 : 0) }

    mutating func text(_ value: [UInt8]) {
        count(value.count)
        bytes += value
    }

    mutating func plan(_ plan: Plan) {
        text(plan.name)
        bytes.append(plan.architecture.rawValue)
        count(plan.ramFrames)
        count(plan.deviceFrames)
        count(plan.videoMemoryPages)
        count(plan.graphicsSystemPages)
        flag(plan.transparentHugePages)
        count(plan.swapPages)
        flag(plan.swapIsSlow)
        flag(plan.reclaims)
        count(plan.hugePages2M)
        count(plan.hugePages1G)
        flag(plan.allowUnsafeMappings)
        count(plan.virtualCPUs)
        number(plan.dirtyRingBytes)
        flag(plan.hasPrivateMemory)
        flag(plan.asyncFaults)
        count(plan.pageTables.map { $0 + 1 } ?? 0)
        count(plan.regions.count)
        for each in plan.regions { region(each) }
        count(plan.slots.count)
        for each in plan.slots { slot(each) }
        count(plan.phases.count)
        for each in plan.phases { phase(each) }
        count(plan.expectations.count)
        for each in plan.expectations { statistic(each) }
    }

    mutating func region(_ region: RegionPlan) {
        text(region.name)
        bytes.append(region.kind.rawValue)
        number(region.address.value)
        number(region.size)
        flag(region.read)
        flag(region.write)
        count(region.order)
        flag(region.hugePages)
        count(region.source.map { $0 + 1 } ?? 0)
        flag(region.slow)
        bytes.append(region.userFaults)
        flag(region.pageLevel == .page1G)
    }

    mutating func slot(_ slot: SlotPlan) {
        number(UInt64(slot.id))
        number(slot.guestAddress.value)
        count(slot.region)
        number(slot.offset)
        number(slot.size)
        flag(slot.logDirtyPages)
        flag(slot.readOnly)
        flag(slot.guestMemory)
    }

    mutating func phase(_ phase: PhasePlan) {
        text(phase.name)
        count(phase.tasks.count)
        for each in phase.tasks { task(each) }
    }

    mutating func task(_ task: TaskPlan) {
        switch task.actor {
        case .host: count(0)
        case .virtualCPU(let index): count(2 * index + 1)
        case .background(let task): count(2 * Int(task.rawValue) + 2)
        }
        count(task.steps.count)
        for each in task.steps { step(each) }
    }

    mutating func step(_ step: StepPlan) {
        count(step.line)
        action(step.action)
        expectation(step.expectation)
        count(step.exceptions.count)
        for each in step.exceptions {
            bytes.append(each.architectures.rawValue)
            expectation(each.expectation)
        }
    }

    mutating func expectation(_ expectation: StepExpectation) {
        switch expectation {
        case .success: bytes.append(0)
        case .value(let value):
            bytes.append(1)
            number(value)
        case .counting(let first):
            bytes.append(2)
            number(first)
        case .mmio: bytes.append(3)
        case .error(let errno):
            bytes.append(4)
            number(UInt64(errno.rawValue))
        case .pages(let pages):
            bytes.append(5)
            count(pages.count)
            for page in pages { number(page) }
        case .anything: bytes.append(6)
        case .oneOf(let list):
            bytes.append(7)
            count(list.count)
            for single in list { self.expectation(single) }
        case .dirtyRingFull: bytes.append(8)
        case .memoryFault: bytes.append(9)
        case .pageFault: bytes.append(10)
        }
    }

    mutating func statistic(_ expectation: StatisticExpectation) {
        bytes.append(expectation.statistic.rawValue)
        number(expectation.value)
        bytes.append(expectation.architectures.rawValue)
    }
}
