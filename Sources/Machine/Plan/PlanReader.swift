import Frames

/// Reads what `PlanWriter` wrote, and refuses the rest.
struct PlanReader {
    let bytes: [UInt8]
    var offset = 0
    /// What the plan has, for checking references to it.
    var regions = 0
    var virtualCPUs = 0

    init(_ bytes: [UInt8]) { self.bytes = bytes }

    func bad(_ reason: PlanDecodingError.Reason) -> PlanDecodingError { PlanDecodingError(reason, at: offset) }

    mutating func byte() throws(PlanDecodingError) -> UInt8 {
        guard offset < bytes.count else { throw bad(.truncated) }
        offset += 1
        return bytes[offset - 1]
    }

    mutating func number() throws(PlanDecodingError) -> UInt64 {
        var value: UInt64 = 0
        var shift: UInt64 = 0
        while true {
            let next = try byte()
            let part = UInt64(next & 0x7f)
            guard shift < 63 || (shift == 63 && part <= 1) else { throw bad(.badValue) }
            value |= part << shift
            if next & 0x80 == 0 { return value }
            shift += 7
        }
    }

    mutating func count() throws(PlanDecodingError) -> Int {
        guard let value = Int(exactly: try number()) else { throw bad(.badValue) }
        return value
    }

    /// The length of a list. Each element takes a byte at least, so a longer list is cut off; nothing is allocated for
    /// what isn't there.
    mutating func length() throws(PlanDecodingError) -> Int {
        let value = try count()
        guard value <= bytes.count - offset else { throw bad(.truncated) }
        return value
    }

    mutating func flag() throws(PlanDecodingError) -> Bool {
        switch try byte() {
        case 0: return false
        case 1: return true
        default: throw bad(.badValue)
        }
    }

    mutating func text() throws(PlanDecodingError) -> [UInt8] {
        let length = try length()
        offset += length
        return [UInt8](bytes[offset - length..<offset])
    }

    mutating func enumeration<Case: RawRepresentable>() throws(PlanDecodingError) -> Case
    where Case.RawValue == UInt8 {
        guard let value = Case(rawValue: try byte()) else { throw bad(.badValue) }
        return value
    }

    mutating func list<Element>(
        _ element: (inout PlanReader) throws(PlanDecodingError) -> Element
    ) throws(PlanDecodingError) -> [Element] {
        var elements: [Element] = []
        for _ in 0..<(try length()) { elements.append(try element(&self)) }
        return elements
    }

    mutating func plan() throws(PlanDecodingError) -> Plan {
        var plan = Plan()
        plan.name = try text()
        plan.architecture = try enumeration()
        plan.ramFrames = try count()
        plan.deviceFrames = try count()
        plan.videoMemoryPages = try count()
        plan.graphicsSystemPages = try count()
        plan.transparentHugePages = try flag()
        plan.swapPages = try count()
        plan.swapIsSlow = try flag()
        plan.reclaims = try flag()
        plan.hugePages2M = try count()
        plan.hugePages1G = try count()
        plan.allowUnsafeMappings = try flag()
        plan.virtualCPUs = try count()
        virtualCPUs = plan.virtualCPUs
        plan.dirtyRingBytes = try number()
        plan.hasPrivateMemory = try flag()
        plan.asyncFaults = try flag()
        let tables = try count()
        plan.regions = try list { (reader: inout PlanReader) throws(PlanDecodingError) in
            let region = try reader.region()
            reader.regions += 1
            return region
        }
        guard tables <= regions else { throw bad(.badReference) }
        plan.pageTables = tables == 0 ? nil : tables - 1
        plan.slots = try list { (reader: inout PlanReader) throws(PlanDecodingError) in try reader.slot() }
        plan.phases = try list { (reader: inout PlanReader) throws(PlanDecodingError) in try reader.phase() }
        plan.expectations = try list { (reader: inout PlanReader) throws(PlanDecodingError) in try reader.statistic() }
        return plan
    }

    mutating func region() throws(PlanDecodingError) -> RegionPlan {
        var region = RegionPlan()
        region.name = try text()
        region.kind = try enumeration()
        region.address = UserAddress(try number())
        region.size = try number()
        region.read = try flag()
        region.write = try flag()
        region.order = try count()
        region.hugePages = try flag()
        // A region before this one.
        let source = try count()
        guard source <= regions else { throw bad(.badReference) }
        region.source = source == 0 ? nil : source - 1
        region.slow = try flag()
        region.userFaults = try byte()
        guard region.userFaults < 8 else { throw bad(.badValue) }
        region.pageLevel = try hugeLevel()
        return region
    }

    /// Of a pool's pages.
    mutating func hugeLevel() throws(PlanDecodingError) -> PageLevel {
        try flag() ? .page1G : .page2M
    }

    /// An index in `Plan.regions`.
    mutating func regionIndex() throws(PlanDecodingError) -> Int {
        let index = try count()
        guard index < regions else { throw bad(.badReference) }
        return index
    }

    mutating func slotID() throws(PlanDecodingError) -> UInt16 {
        guard let id = UInt16(exactly: try number()) else { throw bad(.badValue) }
        return id
    }

    mutating func slot() throws(PlanDecodingError) -> SlotPlan {
        var slot = SlotPlan()
        slot.id = try slotID()
        slot.guestAddress = GuestAddress(try number())
        slot.region = try regionIndex()
        slot.offset = try number()
        slot.size = try number()
        slot.logDirtyPages = try flag()
        slot.readOnly = try flag()
        slot.guestMemory = try flag()
        return slot
    }

    mutating func phase() throws(PlanDecodingError) -> PhasePlan {
        var phase = PhasePlan()
        phase.name = try text()
        phase.tasks = try list { (reader: inout PlanReader) throws(PlanDecodingError) in try reader.task() }
        return phase
    }

    mutating func task() throws(PlanDecodingError) -> TaskPlan {
        var task = TaskPlan()
        task.actor = try actor()
        task.steps = try list { (reader: inout PlanReader) throws(PlanDecodingError) in try reader.step() }
        return task
    }

    /// 0: the host; odd: a vCPU; else one of the host's own tasks.
    private mutating func actor() throws(PlanDecodingError) -> TaskPlan.Actor {
        let value = try count()
        if value == 0 { return .host }
        if value % 2 == 1 {
            guard value / 2 < virtualCPUs else { throw bad(.badReference) }
            return .virtualCPU(value / 2)
        }
        guard let number = UInt8(exactly: value / 2 - 1), let task = BackgroundTask(rawValue: number) else {
            throw bad(.badReference)
        }
        return .background(task)
    }

    mutating func step() throws(PlanDecodingError) -> StepPlan {
        let line = try count()
        var step = StepPlan(try action())
        step.line = line
        step.expectation = try expectation()
        step.exceptions = try list { (reader: inout PlanReader) throws(PlanDecodingError) in
            let architectures = ArchitectureSet(rawValue: try reader.byte())
            return ArchitectureExpectation(architectures, try reader.expectation())
        }
        return step
    }

    mutating func expectation() throws(PlanDecodingError) -> StepExpectation {
        let kind = try byte()
        guard kind == 7 else { return try singleExpectation(kind) }
        let list = try list { (reader: inout PlanReader) throws(PlanDecodingError) in
            try reader.singleExpectation(try reader.byte())
        }
        guard list.count > 1, !list.contains(.anything) else { throw bad(.badValue) }
        return .oneOf(list)
    }

    private mutating func singleExpectation(_ kind: UInt8) throws(PlanDecodingError) -> StepExpectation {
        switch kind {
        case 0: return .success
        case 1: return .value(try number())
        case 2: return .counting(from: try number())
        case 3: return .mmio
        case 4:
            guard let raw = Int32(exactly: try number()), let errno = Errno(rawValue: raw) else {
                throw bad(.badValue)
            }
            return .error(errno)
        case 5:
            return .pages(try list { (reader: inout PlanReader) throws(PlanDecodingError) in try reader.number() })
        case 6: return .anything
        case 8: return .dirtyRingFull
        case 9: return .memoryFault
        case 10: return .pageFault
        default: throw bad(.badValue)
        }
    }

    mutating func statistic() throws(PlanDecodingError) -> StatisticExpectation {
        let statistic: StatisticName = try enumeration()
        var expectation = StatisticExpectation(statistic, try number())
        expectation.architectures = ArchitectureSet(rawValue: try byte())
        return expectation
    }
}
