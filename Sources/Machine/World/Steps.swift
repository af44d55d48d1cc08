import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// The actions of a plan, one by one.
extension World {
    /// Runs a step; the outcome, whether it was expected, and the repetition that decided it.
    func run(_ step: StepPlan, _ actor: TaskPlan.Actor) -> (StepOutcome, Bool, Int) {
        let expectation = step.expectation(on: architecture)
        guard case .guest(let kind, let address, let count, let stride, let value) = step.action else {
            let outcome = perform(step.action, actor)
            return (outcome, expectation.accepts(outcome, repetition: 0), 0)
        }
        guard case .virtualCPU(let number) = actor else { return (.error(.EINVAL), false, 0) }
        var outcome = StepOutcome.done
        for i in 0..<count {
            outcome = access(number, kind, address + UInt64(i) * stride, value &+ UInt64(i))
            if !expectation.accepts(outcome, repetition: i) { return (outcome, false, i) }
        }
        return (outcome, true, max(count - 1, 0))
    }

    private func access(_ cpu: Int, _ kind: AccessKind, _ address: GuestAddress, _ value: UInt64) -> StepOutcome {
        consumers?.writers.lockForRead()
        defer { consumers?.writers.unlockRead() }
        if !pagedCPUs.isEmpty { return pagedAccess(cpu, kind, address, value) }
        switch cpus[cpu].access(kind, address, value: value) {
        case .value(let value): return kind == .execute ? .done : .value(value)
        case .stored: return .done
        case .emulated: return .emulated
        case .mmio: return .mmio
        case .failed(let errno):
            return errno == .EFAULT && cpus[cpu].memoryFault != nil ? .memoryFault : .error(errno)
        case .dirtyRingFull: return .dirtyRingFull
        }
    }

    private func perform(_ action: Action, _ actor: TaskPlan.Actor) -> StepOutcome {
        do throws(Errno) {
            if case .preFault(let address, let size) = action { return try preFault(actor, address, size) }
            if action.changesGuestTables { return try changeGuestTables(action, actor) }
            return try performOrThrow(action)
        } catch {
            return .error(error)
        }
    }

    private func performOrThrow(_ action: Action) throws(Errno) -> StepOutcome {
        switch action {
        case .guest: throw .EINVAL
        case .load(let region, let offset): return .value(try addressSpace.load(address(region, offset)))
        case .store(let region, let offset, let value):
            try addressSpace.store(address(region, offset), value)
            consumers?.noteWrite(by: .vmm, at: address(region, offset))
        case .munmap(let region, let offset, let length): try addressSpace.unmap(range(region, offset, length))
        case .mprotect(let region, let offset, let length, let read, let write):
            try addressSpace.protect(range(region, offset, length), Protection(read: read, write: write))
        case .madviseDontNeed(let region, let offset, let length):
            try addressSpace.advise(range(region, offset, length), .dontNeed)
        case .advise(let region, let offset, let length, let advice):
            try addressSpace.advise(range(region, offset, length), advice.advice)
        case .moveMapping(let region, let offset, let length, let target, let targetOffset):
            try addressSpace.remap(range(region, offset, length), length: length, to: address(target, targetOffset))
        case .pin(let region, let offset, let write): try pin(address(region, offset), write: write)
        case .unpin(let region, let offset): try unpin(address(region, offset))
        case .fork: children.append(try addressSpace.fork())
        case .childStore(let region, let offset, let value): try child().store(address(region, offset), value)
        case .childLoad(let region, let offset): return .value(try child().load(address(region, offset)))
        case .childExit: try exitChild()
        case .moveBuffer, .evictBuffer, .freeBuffer, .driverStore, .driverLoad, .disableDevice, .resetDevice, .mapBlob,
            .unmapBlob, .truncate, .punchHole, .writeBack, .failFault:
            return try performOnDriver(action)
        case .reclaim, .migrate, .compact, .mergePages, .collapsePages, .reap, .hintNUMA, .breakMemory,
            .failAllocation, .failTransfer, .signal:
            try performInBackground(action)
        case .countHugePages(let level, let reserved): return .value(try countHugePages(level, reserved: reserved))
        case .userFaultWait, .userFaultCopy, .userFaultZero, .userFaultContinue, .userFaultProtect:
            try serveUserFault(action)
        case .precopy, .snapshot, .restore: return .value(try useLog(action))
        case .ownStore, .deviceStore: try storeUnseen(action)
        case .collectRing, .resetRings, .setAttributes, .punchPrivate, .cacheStore, .cacheLoad, .fetchPage:
            return try performInMachine(action)
        default: return try performOnMachine(action)
        }
        return .done
    }

    private func performOnDriver(_ action: Action) throws(Errno) -> StepOutcome {
        switch action {
        case .moveBuffer(let region, let toDeviceMemory): try regions[region].move(toDeviceMemory: toDeviceMemory)
        case .evictBuffer(let region): try regions[region].evict()
        case .freeBuffer(let region): try regions[region].free()
        case .driverStore(let region, let offset, let value): try regions[region].driverStore(offset, value)
        case .driverLoad(let region, let offset): return .value(try regions[region].driverLoad(offset))
        case .disableDevice(let region): try regions[region].disable()
        case .resetDevice(let region): try regions[region].reset()
        case .mapBlob(let window, let offset, let resource):
            try regions[window].mapBlob(regions[resource], at: offset)
        case .unmapBlob(let window, let offset): try regions[window].unmapBlob(at: offset)
        case .truncate(let region, let size): try regions[region].truncate(to: size)
        case .punchHole(let region, let offset, let length): try regions[region].punchHole(offset, length)
        case .writeBack(let region): try regions[region].writeBack()
        case .failFault(let region, let answer, let count): try regions[region].failFaults(answer, count: count)
        default: throw .EINVAL
        }
        return .done
    }

    private func performOnMachine(_ action: Action) throws(Errno) -> StepOutcome {
        switch action {
        case .setMemoryRegion(let slot): try setMemoryRegion(try memoryRegion(slot))
        case .deleteMemoryRegion(let id):
            try setMemoryRegion(
                MemoryRegion(slot: UInt32(id), guestAddress: GuestAddress(0), size: 0, userAddress: UserAddress(0)))
        case .getDirtyLog(let id):
            let found = pages(in: try vm.getDirtyLog(slot: UInt32(id)))
            // With manual protection nothing is protected yet: the pages are copied after CLEAR.
            noteHarvest(id, vm.manualProtect.enabled ? [] : found)
            return .pages(found)
        case .clearDirtyLog(let id, let first, let count):
            let words = [UInt64](repeating: ~0, count: Int((count + 63) / 64))
            try vm.clearDirtyLog(slot: UInt32(id), firstPage: first, pages: count, bitmap: words)
            noteHarvest(id, Array(first..<(first + count)))
        case .enableManualProtect(let initiallySet):
            var flags = ManualProtect()
            flags.enabled = true
            flags.initiallySet = initiallySet
            try vm.setManualProtect(flags)
        case .mapGuestPage(let address, let write): try mapGuestPage(address, write: write)
        case .getGuestPage(let address, let write): try getGuestPage(address, write: write)
        case .age(let region, let offset, let length):
            _ = addressSpace.clearFlushYoung(range(region, offset, length))
        default: throw .EINVAL
        }
        return .done
    }

    func noteHarvest(_ id: UInt16, _ pages: [UInt64]) {
        for slot in vm.activeSlots where slot.id == id { stepChecks.harvested(slot, pages) }
    }

    private func mapGuestPage(_ address: GuestAddress, write: Bool) throws(Errno) {
        let side = vm.slotReaders.enter()
        defer { vm.slotReaders.exit(side) }
        let map = try vm.map(address.frame, writable: write)
        map.unmap()
    }

    private func getGuestPage(_ address: GuestAddress, write: Bool) throws(Errno) {
        let side = vm.slotReaders.enter()
        defer { vm.slotReaders.exit(side) }
        guard let page = vm.page(of: address.frame, write: write) else { throw .EFAULT }
        page.releaseClean(stabilisedBy: .exclusiveOwner)
    }

    func pages(in bitmap: [UInt64]) -> [UInt64] {
        var pages: [UInt64] = []
        for (index, word) in bitmap.enumerated() {
            var rest = word
            while rest != 0 {
                pages.append(UInt64(index * 64 + rest.trailingZeroBitCount))
                rest &= rest - 1
            }
        }
        return pages
    }

    func address(_ region: Int, _ offset: UInt64) -> UserAddress { plan.regions[region].address + offset }

    func range(_ region: Int, _ offset: UInt64, _ length: UInt64) -> Range<UserAddress> {
        address(region, offset)..<address(region, offset + length)
    }

    private func child() throws(Errno) -> AddressSpace {
        guard let child = children.last else { throw .EINVAL }
        return child
    }

    private func exitChild() throws(Errno) {
        guard let child = children.popLast() else { throw .EINVAL }
        child.exit()
    }
}

extension StepExpectation {
    /// Whether repetition `repetition` of a step may end with `outcome`.
    public func accepts(_ outcome: StepOutcome, repetition: Int) -> Bool {
        switch (self, outcome) {
        case (.success, .done), (.success, .value), (.success, .emulated), (.success, .pages): true
        case (.value(let wanted), .value(let found)): wanted == found
        case (.counting(let from), .value(let found)): from &+ UInt64(repetition) == found
        case (.mmio, .mmio), (.dirtyRingFull, .dirtyRingFull), (.memoryFault, .memoryFault), (.pageFault, .pageFault):
            true
        case (.error(let wanted), .error(let found)): wanted == found
        case (.pages(let wanted), .pages(let found)): wanted == found
        case (.anything, _): true
        case (.oneOf(let list), _): list.contains { $0.accepts(outcome, repetition: repetition) }
        default: false
        }
    }
}
