import Frames
import Machine
import Testing

/// A plan is the same plan after it was bytes, and bytes that are no plan are refused.
@Suite struct PlansAsBytes {
    @Test func `a random plan comes back`() throws {
        var random = RandomSource.fresh()
        print("seed \(random.seed)")
        for round in 0..<300 {
            let plan = random.plan()
            #expect(try Plan(decoding: plan.encoded()) == plan, "seed \(random.seed), round \(round)")
        }
    }
    @Test func `every prefix of a plan is truncated`() throws {
        var random = RandomSource(seed: 1)
        let bytes = random.plan().encoded()
        for length in bytes.indices {
            do throws(PlanDecodingError) {
                _ = try Plan(decoding: Array(bytes[..<length]))
                Issue.record("\(length) of \(bytes.count) bytes are a plan")
            } catch {
                #expect(error.reason == .truncated)
                #expect(error.offset <= length)
            }
        }
    }
    @Test func `changed and random bytes never trap`() throws {
        var random = RandomSource.fresh()
        print("seed \(random.seed)")
        for round in 0..<2000 {
            var bytes = random.plan().encoded()
            for _ in 0...random.below(3) {
                bytes[random.below(bytes.count)] = UInt8(truncatingIfNeeded: random.next())
            }
            if random.below(10) == 0 {
                bytes = bytes.prefix(5) + (0..<random.below(64)).map { _ in UInt8(truncatingIfNeeded: random.next()) }
            }
            do throws(PlanDecodingError) {
                let plan = try Plan(decoding: bytes)
                // What was read is a plan like any other.
                #expect(try Plan(decoding: plan.encoded()) == plan, "seed \(random.seed), round \(round)")
                let regions = plan.slots.allSatisfy { plan.regions.indices.contains($0.region) }
                #expect(regions, "seed \(random.seed), round \(round)")
            } catch {
                #expect(error.offset <= bytes.count, "seed \(random.seed), round \(round)")
            }
        }
    }

    private func expect(
        _ reason: PlanDecodingError.Reason, at offset: Int, _ bytes: [UInt8],
        sourceLocation: SourceLocation = #_sourceLocation
    ) {
        #expect(throws: PlanDecodingError(reason, at: offset), sourceLocation: sourceLocation) {
            _ = try Plan(decoding: bytes)
        }
    }
    @Test func `nothing`() { expect(.truncated, at: 0, []) }
    @Test func `another file`() { expect(.notAPlan, at: 1, Array("FRPN".utf8)) }
    @Test func `another version`() { expect(.unknownVersion, at: 4, Array("FLPN".utf8) + [9]) }
    @Test func `bytes after the plan`() {
        let bytes = Plan().encoded()
        expect(.trailingBytes, at: bytes.count, bytes + [0])
    }
    @Test func `a list longer than the bytes allocates nothing`() {
        expect(.truncated, at: 14, Array("FLPN".utf8) + [3, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f])
    }
    @Test func `a number of more than 64 bits`() {
        expect(.badValue, at: 15, Array("FLPN".utf8) + [3] + [UInt8](repeating: 0xff, count: 10))
    }
    @Test func `a slot of a region that there isn't`() {
        var plan = Plan()
        plan.regions = [RegionPlan()]
        plan.slots = [SlotPlan()]
        plan.slots[0].region = 1
        #expect(throws: PlanDecodingError.self) { _ = try Plan(decoding: plan.encoded()) }
    }
    @Test func `a udmabuf's memfd comes before it`() throws {
        var plan = Plan()
        plan.regions = [RegionPlan(), RegionPlan()]
        plan.regions[1].source = 0
        #expect(try Plan(decoding: plan.encoded()) == plan)
        for source in [1, 2] {
            plan.regions[1].source = source
            #expect(throws: PlanDecodingError.self) { _ = try Plan(decoding: plan.encoded()) }
        }
    }
    @Test func `the ring of a vCPU that there isn't`() throws {
        var plan = Plan()
        plan.phases = [PhasePlan()]
        plan.phases[0].tasks = [TaskPlan()]
        plan.phases[0].tasks[0].steps = [StepPlan(.collectRing(cpu: 1))]
        #expect(throws: PlanDecodingError.self) { _ = try Plan(decoding: plan.encoded()) }
        plan.virtualCPUs = 2
        #expect(try Plan(decoding: plan.encoded()) == plan)
    }
    @Test func `a program of a vCPU that there isn't`() {
        var plan = Plan()
        plan.phases = [PhasePlan()]
        plan.phases[0].tasks = [TaskPlan()]
        plan.phases[0].tasks[0].actor = .virtualCPU(1)
        #expect(throws: PlanDecodingError.self) { _ = try Plan(decoding: plan.encoded()) }
        plan.virtualCPUs = 2
        #expect(throws: Never.self) { _ = try Plan(decoding: plan.encoded()) }
    }
}

extension RandomSource {
    mutating func text() -> [UInt8] { (0..<below(12)).map { _ in UInt8(truncatingIfNeeded: next()) } }
    mutating func many<Element>(_ most: Int, _ element: (inout RandomSource) -> Element) -> [Element] {
        (0..<below(most + 1)).map { _ in element(&self) }
    }

    mutating func plan() -> Plan {
        var plan = Plan()
        plan.name = text()
        plan.architecture = pick(Architecture.allCases)
        plan.ramFrames = below(1 << 30)
        plan.deviceFrames = below(1 << 30)
        plan.videoMemoryPages = below(1 << 20)
        plan.graphicsSystemPages = below(1 << 20)
        plan.transparentHugePages = flip()
        plan.hugePages2M = below(1 << 10)
        plan.hugePages1G = below(4)
        plan.allowUnsafeMappings = flip()
        plan.virtualCPUs = 1 + below(16)
        plan.dirtyRingBytes = number()
        plan.hasPrivateMemory = flip()
        plan.asyncFaults = flip()
        plan.regions = (0..<(1 + below(5))).map { region($0) }
        let regions = plan.regions.count
        plan.pageTables = flip() ? below(regions) : nil
        plan.slots = many(4) { $0.slot(regions) }
        let cpus = plan.virtualCPUs
        plan.phases = many(4) { random in
            var phase = PhasePlan()
            phase.name = random.text()
            phase.tasks = random.many(3) { $0.task(cpus, regions) }
            return phase
        }
        plan.expectations = many(4) { random in
            var expectation = StatisticExpectation(random.pick(StatisticName.allCases), random.number())
            expectation.architectures = random.pick([.all, .riscv, .x86])
            return expectation
        }
        return plan
    }

    private mutating func region(_ earlier: Int) -> RegionPlan {
        var region = RegionPlan()
        region.name = text()
        region.kind = pick(RegionKind.allCases)
        region.address = UserAddress(number())
        region.size = number()
        region.read = flip()
        region.write = flip()
        region.order = below(11)
        region.hugePages = flip()
        region.pageLevel = flip() ? .page1G : .page2M
        region.source = earlier > 0 && flip() ? below(earlier) : nil
        return region
    }

    private mutating func slot(_ regions: Int) -> SlotPlan {
        var slot = SlotPlan()
        slot.id = UInt16(truncatingIfNeeded: next())
        slot.guestAddress = GuestAddress(number())
        slot.region = below(regions)
        slot.offset = number()
        slot.size = number()
        slot.logDirtyPages = flip()
        slot.readOnly = flip()
        slot.guestMemory = flip()
        return slot
    }

    private mutating func task(_ cpus: Int, _ regions: Int) -> TaskPlan {
        var task = TaskPlan()
        task.actor = pick([.host, .virtualCPU(below(cpus)), .background(pick(BackgroundTask.allCases))])
        task.steps = many(6) { random in
            var step = StepPlan(random.action(regions, cpus))
            step.line = random.below(10_000)
            step.expectation = random.expectation()
            step.exceptions = random.many(2) {
                ArchitectureExpectation($0.pick([.riscv, .x86]), $0.expectation())
            }
            return step
        }
        return task
    }

    private mutating func expectation() -> StepExpectation {
        guard below(4) == 0 else { return singleExpectation() }
        return .oneOf([singleExpectation(), singleExpectation()] + many(2) { $0.singleExpectation() })
    }

    private mutating func singleExpectation() -> StepExpectation {
        switch below(9) {
        case 0: .success
        case 1: .value(number())
        case 2: .counting(from: number())
        case 3: .mmio
        case 4: .error(pick([.EFAULT, .EHWPOISON, .EPERM, .EINVAL]))
        case 5: .dirtyRingFull
        case 6: .memoryFault
        case 7: .pageFault
        default: .pages(many(5) { $0.number() })
        }
    }

    private mutating func action(_ regions: Int, _ cpus: Int) -> Action {
        let region = below(regions)
        switch below(52) {
        case 0:
            return .guest(
                pick(AccessKind.allCases), at: GuestAddress(number()), count: below(1 << 20), stride: number(),
                value: number())
        case 1: return .load(region: region, offset: number())
        case 2: return .store(region: region, offset: number(), value: number())
        case 3: return .munmap(region: region, offset: number(), length: number())
        case 4: return .mprotect(region: region, offset: number(), length: number(), read: flip(), write: flip())
        case 5: return .madviseDontNeed(region: region, offset: number(), length: number())
        case 6: return .fork
        case 7: return .childStore(region: region, offset: number(), value: number())
        case 8: return .childLoad(region: region, offset: number())
        case 9: return .childExit
        case 10: return .moveBuffer(region: region, toDeviceMemory: flip())
        case 11: return .evictBuffer(region: region)
        case 12: return .freeBuffer(region: region)
        case 13: return .driverStore(region: region, offset: number(), value: number())
        case 14: return .driverLoad(region: region, offset: number())
        case 15: return .disableDevice(region: region)
        case 16: return .setMemoryRegion(slot(regions))
        case 17: return .deleteMemoryRegion(id: UInt16(truncatingIfNeeded: next()))
        case 18: return .getDirtyLog(id: UInt16(truncatingIfNeeded: next()))
        case 19: return .clearDirtyLog(id: UInt16(truncatingIfNeeded: next()), firstPage: number(), pages: number())
        case 20: return .enableManualProtect(initiallySet: flip())
        case 21: return .mapGuestPage(at: GuestAddress(number()), write: flip())
        case 23: return .resetDevice(region: region)
        case 24: return .mapBlob(window: region, offset: number(), resource: below(regions))
        case 25: return .unmapBlob(window: region, offset: number())
        case 26: return .truncate(region: region, size: number())
        case 27: return .punchHole(region: region, offset: number(), length: number())
        case 28: return .writeBack(region: region)
        case 29: return .failFault(region: region, answer: pick(DriverAnswer.allCases), count: below(1000))
        case 30: return .signal(pick(SignalName.allCases))
        case 31: return .countHugePages(flip() ? .page1G : .page2M, reserved: flip())
        case 32: return .precopy(pick(PrecopyStep.allCases))
        case 33: return .snapshot(pick(SnapshotKind.allCases))
        case 34: return .restore
        case 35: return .ownStore(region: region, offset: number(), value: number())
        case 38: return .collectRing(cpu: below(cpus))
        case 39: return .resetRings
        case 40: return .setAttributes(at: GuestAddress(number()), size: number(), isPrivate: flip())
        case 41: return .punchPrivate(at: GuestAddress(number()), size: number())
        case 42: return .cacheStore(at: GuestAddress(number()), value: number())
        case 43: return .cacheLoad(at: GuestAddress(number()))
        case 44: return .preFault(at: GuestAddress(number()), size: number())
        case 45: return .fetchPage
        case 46:
            return .mapPage(
                at: GuestAddress(number()), to: GuestAddress(number()), level: UInt8(1 + below(2)),
                pick(GuestRights.allCases))
        case 47: return .unmapPage(at: GuestAddress(number()), level: UInt8(1 + below(4)))
        case 48:
            return .protectPage(
                at: GuestAddress(number()), level: UInt8(1 + below(4)), pick(GuestRights.allCases))
        case 49: return .restorePage(at: GuestAddress(number()), level: UInt8(1 + below(4)))
        case 50: return .flushPage(at: GuestAddress(number()))
        case 51: return .loadCR3
        case 36: return .deviceStore(region: region, offset: number(), value: number())
        case 22: return .getGuestPage(at: GuestAddress(number()), write: flip())
        default: return .age(region: region, offset: number(), length: number())
        }
    }
}
