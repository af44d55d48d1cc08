// The bytes of an action: a code, then its payload. Codes are never reused; a new action takes the next free one.

import Frames

enum ActionCode: UInt8 {
    case guest, load, store, munmap, mprotect, madviseDontNeed
    case fork, childStore, childLoad, childExit
    case moveBuffer, evictBuffer, freeBuffer, driverStore, driverLoad, disableDevice
    case setMemoryRegion, deleteMemoryRegion, getDirtyLog, clearDirtyLog, enableManualProtect
    case mapGuestPage, getGuestPage, age
    case resetDevice, mapBlob, unmapBlob, truncate, punchHole, writeBack
    case advise, moveMapping, pin, unpin
    case reclaim, migrate, compact, mergePages, collapsePages, reap, hintNUMA, breakMemory, failAllocation, failTransfer
    case userFaultWait, userFaultCopy, userFaultZero, userFaultContinue, userFaultProtect
    case signal, countHugePages, failFault
    case precopy, snapshot, restore, ownStore, deviceStore
    case collectRing, resetRings, setAttributes, punchPrivate, cacheStore, cacheLoad, preFault, fetchPage
    case mapPage, unmapPage, protectPage, restorePage, flushPage, loadCR3
}

extension PlanWriter {
    mutating func code(_ code: ActionCode) { bytes.append(code.rawValue) }

    private mutating func place(_ code: ActionCode, _ region: Int, _ offset: UInt64) {
        self.code(code)
        count(region)
        number(offset)
    }

    private mutating func range(_ code: ActionCode, _ region: Int, _ offset: UInt64, _ length: UInt64) {
        place(code, region, offset)
        number(length)
    }

    private mutating func regionOnly(_ code: ActionCode, _ region: Int) {
        self.code(code)
        count(region)
    }

    mutating func action(_ action: Action) {
        switch action {
        case .guest, .mapGuestPage, .getGuestPage: guestAction(action)
        case .setMemoryRegion, .deleteMemoryRegion, .getDirtyLog, .clearDirtyLog, .enableManualProtect:
            ioctl(action)
        case .resetDevice, .mapBlob, .unmapBlob, .truncate, .punchHole, .writeBack, .failFault: backingAction(action)
        case .reclaim, .migrate, .compact, .mergePages, .collapsePages, .reap, .hintNUMA, .breakMemory,
            .failAllocation, .failTransfer, .signal, .countHugePages:
            backgroundAction(action)
        case .userFaultWait, .userFaultCopy, .userFaultZero, .userFaultContinue, .userFaultProtect:
            userFaultAction(action)
        case .precopy, .snapshot, .restore, .ownStore, .deviceStore: consumerAction(action)
        case .collectRing, .resetRings, .setAttributes, .punchPrivate, .cacheStore, .cacheLoad, .preFault, .fetchPage:
            machineAction(action)
        case .mapPage, .unmapPage, .protectPage, .restorePage, .flushPage, .loadCR3: tableAction(action)
        default: hostAction(action)
        }
    }

    private mutating func guestAction(_ action: Action) {
        switch action {
        case .guest(let kind, let address, let repeats, let stride, let value):
            code(.guest)
            bytes.append(kind.rawValue)
            number(address.value)
            count(repeats)
            number(stride)
            number(value)
        case .mapGuestPage(let address, let write):
            code(.mapGuestPage)
            number(address.value)
            flag(write)
        case .getGuestPage(let address, let write):
            code(.getGuestPage)
            number(address.value)
            flag(write)
        default: preconditionFailure("not a guest address's action")
        }
    }

    private mutating func ioctl(_ action: Action) {
        switch action {
        case .setMemoryRegion(let slot):
            code(.setMemoryRegion)
            self.slot(slot)
        case .deleteMemoryRegion(let id):
            code(.deleteMemoryRegion)
            number(UInt64(id))
        case .getDirtyLog(let id):
            code(.getDirtyLog)
            number(UInt64(id))
        case .clearDirtyLog(let id, let firstPage, let pages):
            code(.clearDirtyLog)
            number(UInt64(id))
            number(firstPage)
            number(pages)
        case .enableManualProtect(let initiallySet):
            code(.enableManualProtect)
            flag(initiallySet)
        default: preconditionFailure("not an ioctl")
        }
    }

    private mutating func backingAction(_ action: Action) {
        switch action {
        case .resetDevice(let region): regionOnly(.resetDevice, region)
        case .mapBlob(let window, let offset, let resource):
            place(.mapBlob, window, offset)
            count(resource)
        case .unmapBlob(let window, let offset): place(.unmapBlob, window, offset)
        case .truncate(let region, let size): place(.truncate, region, size)
        case .punchHole(let region, let offset, let length): range(.punchHole, region, offset, length)
        case .writeBack(let region): regionOnly(.writeBack, region)
        case .failFault(let region, let answer, let count):
            place(.failFault, region, UInt64(count))
            bytes.append(answer.rawValue)
        default: preconditionFailure("not an action on what is behind a mapping")
        }
    }

    private mutating func userFaultAction(_ action: Action) {
        switch action {
        case .userFaultWait: code(.userFaultWait)
        case .userFaultCopy(let region, let offset, let value): range(.userFaultCopy, region, offset, value)
        case .userFaultZero(let region, let offset): place(.userFaultZero, region, offset)
        case .userFaultContinue(let region, let offset): place(.userFaultContinue, region, offset)
        case .userFaultProtect(let region, let offset, let length, let on):
            range(.userFaultProtect, region, offset, length)
            flag(on)
        default: preconditionFailure("not an action of whoever serves userfaults")
        }
    }

    private mutating func consumerAction(_ action: Action) {
        switch action {
        case .precopy(let step):
            code(.precopy)
            bytes.append(step.rawValue)
        case .snapshot(let kind):
            code(.snapshot)
            bytes.append(kind.rawValue)
        case .restore: code(.restore)
        case .ownStore(let region, let offset, let value): range(.ownStore, region, offset, value)
        case .deviceStore(let region, let offset, let value): range(.deviceStore, region, offset, value)
        default: preconditionFailure("not an action of a user of the log")
        }
    }

    private mutating func backgroundAction(_ action: Action) {
        switch action {
        case .reclaim(let pages):
            code(.reclaim)
            count(pages)
        case .migrate(let region, let offset, let length): range(.migrate, region, offset, length)
        case .compact(let order):
            code(.compact)
            count(order)
        case .mergePages: code(.mergePages)
        case .collapsePages: code(.collapsePages)
        case .reap: code(.reap)
        case .hintNUMA(let region, let offset, let length): range(.hintNUMA, region, offset, length)
        case .breakMemory(let region, let offset): place(.breakMemory, region, offset)
        case .failAllocation(let number):
            code(.failAllocation)
            count(number)
        case .failTransfer(let region, let write):
            code(.failTransfer)
            count(region.map { $0 + 1 } ?? 0)
            flag(write)
        case .signal(let signal):
            code(.signal)
            bytes.append(signal.rawValue)
        case .countHugePages(let level, let reserved):
            code(.countHugePages)
            flag(level == .page1G)
            flag(reserved)
        default: preconditionFailure("not an action of the host's own")
        }
    }

    private mutating func hostAction(_ action: Action) {
        switch action {
        case .load(let region, let offset): place(.load, region, offset)
        case .store(let region, let offset, let value): range(.store, region, offset, value)
        case .munmap(let region, let offset, let length): range(.munmap, region, offset, length)
        case .mprotect(let region, let offset, let length, let read, let write):
            range(.mprotect, region, offset, length)
            flag(read)
            flag(write)
        case .madviseDontNeed(let region, let offset, let length): range(.madviseDontNeed, region, offset, length)
        case .advise(let region, let offset, let length, let advice):
            range(.advise, region, offset, length)
            bytes.append(advice.rawValue)
        case .moveMapping(let region, let offset, let length, let target, let targetOffset):
            range(.moveMapping, region, offset, length)
            count(target)
            number(targetOffset)
        case .pin(let region, let offset, let write):
            place(.pin, region, offset)
            flag(write)
        case .unpin(let region, let offset): place(.unpin, region, offset)
        case .fork: code(.fork)
        case .childStore(let region, let offset, let value): range(.childStore, region, offset, value)
        case .childLoad(let region, let offset): place(.childLoad, region, offset)
        case .childExit: code(.childExit)
        case .moveBuffer(let region, let toDeviceMemory):
            regionOnly(.moveBuffer, region)
            flag(toDeviceMemory)
        case .evictBuffer(let region): regionOnly(.evictBuffer, region)
        case .freeBuffer(let region): regionOnly(.freeBuffer, region)
        case .driverStore(let region, let offset, let value): range(.driverStore, region, offset, value)
        case .driverLoad(let region, let offset): place(.driverLoad, region, offset)
        case .disableDevice(let region): regionOnly(.disableDevice, region)
        case .age(let region, let offset, let length): range(.age, region, offset, length)
        default: preconditionFailure("not a host action")
        }
    }
}

extension PlanReader {
    mutating func action() throws(PlanDecodingError) -> Action {
        let code: ActionCode = try enumeration()
        switch code {
        case .guest:
            let kind: AccessKind = try enumeration()
            let address = GuestAddress(try number())
            return .guest(kind, at: address, count: try count(), stride: try number(), value: try number())
        case .mapGuestPage: return .mapGuestPage(at: GuestAddress(try number()), write: try flag())
        case .getGuestPage: return .getGuestPage(at: GuestAddress(try number()), write: try flag())
        case .setMemoryRegion: return .setMemoryRegion(try slot())
        case .deleteMemoryRegion: return .deleteMemoryRegion(id: try slotID())
        case .getDirtyLog: return .getDirtyLog(id: try slotID())
        case .clearDirtyLog:
            return .clearDirtyLog(id: try slotID(), firstPage: try number(), pages: try number())
        case .enableManualProtect: return .enableManualProtect(initiallySet: try flag())
        case .fork: return .fork
        case .childExit: return .childExit
        case .reclaim: return .reclaim(pages: try count())
        case .compact: return .compact(order: try count())
        case .mergePages: return .mergePages
        case .collapsePages: return .collapsePages
        case .reap: return .reap
        case .userFaultWait: return .userFaultWait
        case .failAllocation: return .failAllocation(count: try count())
        case .signal: return .signal(try enumeration())
        case .precopy: return .precopy(try enumeration())
        case .snapshot: return .snapshot(try enumeration())
        case .restore: return .restore
        case .collectRing, .resetRings, .setAttributes, .punchPrivate, .cacheStore, .cacheLoad, .preFault, .fetchPage:
            return try machineAction(code)
        case .mapPage, .unmapPage, .protectPage, .restorePage, .flushPage, .loadCR3: return try tableAction(code)
        case .countHugePages: return .countHugePages(try hugeLevel(), reserved: try flag())
        case .failTransfer:
            let region = try count()
            guard region <= regions else { throw bad(.badReference) }
            return .failTransfer(region: region == 0 ? nil : region - 1, write: try flag())
        default: return try regionAction(code)
        }
    }

    /// The actions that begin with a region.
    private mutating func regionAction(_ code: ActionCode) throws(PlanDecodingError) -> Action {
        let region = try regionIndex()
        switch code {
        case .moveBuffer: return .moveBuffer(region: region, toDeviceMemory: try flag())
        case .evictBuffer: return .evictBuffer(region: region)
        case .freeBuffer: return .freeBuffer(region: region)
        case .disableDevice: return .disableDevice(region: region)
        case .resetDevice: return .resetDevice(region: region)
        case .writeBack: return .writeBack(region: region)
        case .failFault:
            let times = try count()
            return .failFault(region: region, answer: try enumeration(), count: times)
        default: return try placeAction(code, region, offset: try number())
        }
    }

    /// Those that go on with an offset in it.
    private mutating func placeAction(
        _ code: ActionCode, _ region: Int, offset: UInt64
    ) throws(PlanDecodingError) -> Action {
        switch code {
        case .load: return .load(region: region, offset: offset)
        case .store: return .store(region: region, offset: offset, value: try number())
        case .munmap: return .munmap(region: region, offset: offset, length: try number())
        case .mprotect:
            let length = try number()
            return .mprotect(region: region, offset: offset, length: length, read: try flag(), write: try flag())
        case .madviseDontNeed: return .madviseDontNeed(region: region, offset: offset, length: try number())
        case .childStore: return .childStore(region: region, offset: offset, value: try number())
        case .childLoad: return .childLoad(region: region, offset: offset)
        case .driverStore: return .driverStore(region: region, offset: offset, value: try number())
        case .driverLoad: return .driverLoad(region: region, offset: offset)
        case .mapBlob: return .mapBlob(window: region, offset: offset, resource: try regionIndex())
        case .unmapBlob: return .unmapBlob(window: region, offset: offset)
        case .truncate: return .truncate(region: region, size: offset)
        case .punchHole: return .punchHole(region: region, offset: offset, length: try number())
        case .advise:
            let length = try number()
            return .advise(region: region, offset: offset, length: length, try enumeration())
        case .moveMapping:
            let length = try number()
            let target = try regionIndex()
            return .moveMapping(
                region: region, offset: offset, length: length, target: target, targetOffset: try number())
        case .userFaultCopy: return .userFaultCopy(region: region, offset: offset, value: try number())
        case .userFaultZero: return .userFaultZero(region: region, offset: offset)
        case .userFaultContinue: return .userFaultContinue(region: region, offset: offset)
        case .userFaultProtect:
            return .userFaultProtect(region: region, offset: offset, length: try number(), on: try flag())
        case .pin: return .pin(region: region, offset: offset, write: try flag())
        case .unpin: return .unpin(region: region, offset: offset)
        case .migrate: return .migrate(region: region, offset: offset, length: try number())
        case .hintNUMA: return .hintNUMA(region: region, offset: offset, length: try number())
        case .breakMemory: return .breakMemory(region: region, offset: offset)
        case .ownStore: return .ownStore(region: region, offset: offset, value: try number())
        case .deviceStore: return .deviceStore(region: region, offset: offset, value: try number())
        case .age: return .age(region: region, offset: offset, length: try number())
        default: throw bad(.badValue)
        }
    }
}
