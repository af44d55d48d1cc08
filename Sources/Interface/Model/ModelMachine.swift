import Audit
import Frames
import HostMemory
import IoctlScript
import Machine

/// The memory of one executor after another.
public final class ModelStorage {
    /// Pages of RAM that a script may fill: 128 MiB. The arena is committed as it is touched.
    static let ramFrames = 1 << 15
    /// Frames of device memory.
    static let deviceFrames = 1 << 13

    private let arena: MappedArena
    let memory: MemoryStorage

    /// Nil: no room.
    public init?() {
        guard let arena = MappedArena(size: (Self.ramFrames + Self.deviceFrames) * Int(pageSize)) else { return nil }
        self.arena = arena
        memory = MemoryStorage(arena: arena.base, ramFrames: Self.ramFrames, deviceFrames: Self.deviceFrames)
    }
}

/// The host of a script: its processes, and what they map.
final class ModelMachine {
    private let storage: ModelStorage
    let host: Host
    private let journal: Journal
    private var spaces: [AddressSpace?]
    private var regions: [ModelRegion?] = []
    /// Huge pages, set aside when the first region asks for them.
    private var pool: HugePagePool?
    private static let hugePages = 16
    /// More than a script's regions have pages.
    private static let swapSlots = 1 << 11
    private let framesAtStart: Int
    private let largestFile: UInt64
    /// By process.
    private var pipes: [Int: PagePipe] = [:]
    /// Regions that a failed `host` has left nothing of.
    init(_ storage: ModelStorage, _ journal: Journal, _ features: KernelFeatures) {
        largestFile = features.largestFile
        self.storage = storage
        self.journal = journal
        let memory = PhysicalMemory(storage.memory, journal: journal)
        let swap = features.swaps ? SwapDevice(slots: Self.swapSlots) : nil
        host = Host(memory: memory, transparentHugePages: false, swap: swap, reclaims: true)
        framesAtStart = memory.freeFrames
        spaces = [AddressSpace(host: host)]
    }

    /// Nil: it could not be made, or has ended.
    func space(_ process: Int) -> AddressSpace? { spaces.indices.contains(process) ? spaces[process] : nil }

    private func region(_ number: Int) -> ModelRegion? { regions.indices.contains(number) ? regions[number] : nil }

    /// Ends every process. I-28.
    func finish() {
        for pipe in pipes.values { pipe.drain() }
        for index in spaces.indices {
            spaces[index]?.exit()
            spaces[index] = nil
        }
        var owned = 0
        for region in regions { owned += region?.release() ?? 0 }
        if let pool {
            if !pool.isWhole { journal.add(Finding(.i28, "a pool of huge pages has not all of its pages back")) }
            owned += pool.pages * Int(pool.level.frames)
        }
        if host.memory.freeFrames + owned != framesAtStart {
            journal.add(Finding(.i28, "memory is still in use after the VM and its process have ended"))
        }
        regions = []
    }

    func perform(_ step: Step, process: Int, _ space: AddressSpace) -> Answer {
        do throws(Errno) {
            switch step {
            case .load(let place, let repetition): return access(place, repetition, store: nil, space)
            case .store(let place, let repetition, let value): return access(place, repetition, store: value, space)
            case .fork(let child):
                while spaces.count <= child { spaces.append(nil) }
                spaces[child] = try space.fork()
            case .splice(let place): try pipe(of: process).take(place.address, space)
            case .drain: pipe(of: process).drain()
            case .exit:
                pipe(of: process).drain()
                space.exit()
                spaces[process] = nil
            case .host(let number, let kind, let size, let rights):
                try make(number, kind, size, rights, space)
            case .truncate(let number, let size): try object(number).truncate(to: size)
            case .punchHost(let number, let offset, let length): try object(number).punch(offset, length)
            default: try map(step, space)
            }
            return .done
        } catch {
            return Answer(error)
        }
    }

    private func pipe(of process: Int) -> PagePipe {
        if let pipe = pipes[process] { return pipe }
        let pipe = PagePipe()
        pipes[process] = pipe
        return pipe
    }

    private func object(_ number: Int) throws(Errno) -> ModelRegion {
        guard let region = region(number) else { throw .EBADF }
        return region
    }

    // MARK: Mappings

    private func make(
        _ number: Int, _ kind: HostKind, _ size: UInt64, _ rights: Rights, _ space: AddressSpace
    ) throws(Errno) {
        while regions.count <= number { regions.append(nil) }
        if kind == .hugetlb || kind == .hugetlbPrivate, pool == nil {
            pool = HugePagePool(host, level: .page2M, pages: Self.hugePages)
        }
        guard let region = ModelRegion(kind, size: size, host, pool, largestFile: largestFile) else { throw .ENOMEM }
        regions[number] = region
        guard let backing = region.backing() else { return }
        try space.map(
            at: UserAddress(HostPlace(.region(number)).address), length: size, protection: rights.protection,
            backing: backing)
    }

    private func map(_ step: Step, _ space: AddressSpace) throws(Errno) {
        let calls = SystemCalls(space)
        switch step {
        case .map(let place, let length, let rights, let source, let replaces):
            try map(place, length, rights, source, replaces: replaces, space)
        case .unmap(let place, let length): try calls.munmap(place.address, length)
        case .protect(let place, let length, let rights):
            try calls.mprotect(place.address, length, UInt64(rights.rawValue))
        case .advise(let place, let length, let advice): try calls.madvise(place.address, length, advice.rawValue)
        case .remap(let place, let length, let newLength, let target):
            let bits = SystemCalls.Bits.mremapMayMove | SystemCalls.Bits.mremapFixed
            try calls.mremap(
                place.address, length, newLength, flags: target == nil ? 0 : bits, newAddress: target?.address ?? 0)
        default: preconditionFailure("no call of the host")
        }
    }

    private func map(
        _ place: HostPlace, _ length: UInt64, _ rights: Rights, _ source: MapSource, replaces: Bool,
        _ space: AddressSpace
    ) throws(Errno) {
        typealias Bits = SystemCalls.Bits
        var flags = replaces ? Bits.mapFixed : Bits.mapFixedNoReplace
        var object: MemoryObject?
        var offset: UInt64 = 0
        switch source {
        case .anonymous: flags |= Bits.mapAnonymous | Bits.mapPrivate
        case .sharedAnonymous: flags |= Bits.mapAnonymous | Bits.mapShared
        case .object(let number, let start):
            guard let region = region(number) else { throw .EBADF }
            if region.isHuge { return try mapHuge(region, place, length, rights, start, replaces: replaces, space) }
            object = region.object
            flags |= region.isShared ? Bits.mapShared : Bits.mapPrivate
            offset = start
        }
        try SystemCalls(space).mmap(
            place.address, length, protection: UInt64(rights.rawValue), flags: flags, object: object, offset: offset)
    }

    /// Kernel: `hugetlbfs_file_mmap`: whole huge pages.
    private func mapHuge(
        _ region: ModelRegion, _ place: HostPlace, _ length: UInt64, _ rights: Rights, _ offset: UInt64,
        replaces: Bool, _ space: AddressSpace
    ) throws(Errno) {
        let size = PageLevel.page2M.bytes
        guard offset % size == 0, length > 0, length <= UserAddress.end.value, place.address % size == 0 else {
            throw .EINVAL
        }
        let rounded = (length + size - 1) / size * size
        guard let backing = region.backing(firstHugePage: Int(offset / size)) else { throw .EBADF }
        try space.map(
            at: UserAddress(place.address), length: rounded, protection: rights.protection, backing: backing,
            replacing: replaces)
    }

    // MARK: The process's own accesses

    /// Ends at the first signal.
    private func access(
        _ place: HostPlace, _ repetition: Repetition, store value: UInt64?, _ space: AddressSpace
    ) -> Answer {
        var found: [UInt64] = []
        var done: UInt64 = 0
        var outcome = Answer.Outcome.returned(0)
        while done < repetition.count {
            do throws(UserFault) {
                let word = try space.access(UserAddress(place.address &+ done &* repetition.stride), store: value)
                if value == nil { found.append(word) }
                done += 1
            } catch {
                outcome = Self.outcome(error)
                break
            }
        }
        var fields: [Answer.Field] = []
        if done < repetition.count { fields.append(.init("done", .decimal(done))) }
        if !found.isEmpty { fields.append(.init("values", .list(found))) }
        return Answer(outcome, fields)
    }

    private static func outcome(_ fault: UserFault) -> Answer.Outcome {
        switch fault {
        case .segmentation: .signal("SIGSEGV")
        case .bus, .poisoned: .signal("SIGBUS")
        case .outOfMemory, .killed: .signal("SIGKILL")
        }
    }
}

extension Rights {
    var protection: Protection {
        Protection(read: contains(.read), write: contains(.write), execute: contains(.execute))
    }
}
