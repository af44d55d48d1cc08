import Frames
import HostMemory
import Machine

/// The same processes on the model.
final class ModelHost {
    static let base = UserAddress(0x1000_0000_0000)
    static let windowPages = 64
    static let mostProcesses = 4
    static let mostFiles = 3
    /// Frames of RAM: four processes' windows, as many private copies, files, tables.
    static let ramFrames = 2048

    private let arena: MappedArena
    private let host: Host
    private var processes: [AddressSpace?] = []
    private var files: [MemoryObject] = []
    private var secret: MemoryObject
    private static let secretPages = 16
    private var freeAtStart = 0

    /// Nil: no room.
    /// - Parameter swaps: with a swap device.
    init?(swaps: Bool) {
        guard let arena = MappedArena(size: Self.ramFrames * Int(pageSize)) else { return nil }
        self.arena = arena
        let memory = PhysicalMemory(arena: arena.base, ramFrames: Self.ramFrames, arenaIsZero: true)
        host = Host(
            memory: memory, transparentHugePages: false, faultAroundPages: MachineSettings.faultAroundPages,
            swap: swaps ? SwapDevice(slots: 4 * Self.ramFrames) : nil, reclaims: true)
        secret = MemoryObject(host: host, pages: Self.secretPages, secret: true)
        begin()
    }

    // Before the arena goes, in which everything lies.
    deinit { end() }

    /// Ends everything. Returns the frames that are still in use, and should not be.
    @discardableResult func end() -> Int {
        for process in processes { process?.exit() }
        processes = []
        files = []
        secret.truncate(to: 0)
        return freeAtStart - host.memory.freeFrames + (host.swap?.usedSlots ?? 0)
    }

    func begin() {
        end()
        freeAtStart = host.memory.freeFrames
        processes = [AddressSpace(host: host)] + Array(repeating: nil, count: Self.mostProcesses - 1)
        secret = MemoryObject(host: host, pages: Self.secretPages, secret: true)
        files = (0..<Self.mostFiles).map { _ in MemoryObject(host: host, pages: 0) }
    }

    private func address(_ page: Int) -> UserAddress { Self.base + UInt64(page) * pageSize }
    private func range(_ pages: Range<Int>) -> Range<UserAddress> {
        address(pages.lowerBound)..<address(pages.upperBound)
    }

    private func space(_ process: Int) -> AddressSpace {
        guard let space = processes[process] else { preconditionFailure("process \(process) is not running") }
        return space
    }

    func perform(_ call: HostCall) -> HostAnswer {
        do throws(Errno) { return try tryPerform(call) } catch { return .error(error) }
    }

    private func tryPerform(_ call: HostCall) throws(Errno) -> HostAnswer {
        switch call {
        case .map(let process, let pages, let kind, let protection):
            let backing: Backing =
                switch kind {
                case .anonymous: .anonymous
                case .anonymousShared: .anonymousShared
                case .file(let file, let first, let shared): .object(files[file], firstPage: first, shared: shared)
                case .secret(let first, let shared): .object(secret, firstPage: first, shared: shared)
                }
            try space(process).map(
                at: address(pages.lowerBound), length: UInt64(pages.count) * pageSize, protection: protection,
                backing: backing)
        case .unmap(let process, let pages): try space(process).unmap(range(pages))
        case .protect(let process, let pages, let protection):
            try space(process).protect(range(pages), protection)
        case .advise(let process, let pages, let advice):
            let modelled: Advice =
                switch advice {
                case .dontNeed: .dontNeed
                case .hugePage: .hugePage
                case .noHugePage: .noHugePage
                case .mergeable: .mergeable
                case .unmergeable: .unmergeable
                case .populateRead: .populateRead
                case .populateWrite: .populateWrite
                case .remove: .remove
                case .cold: .cold
                case .pageOut: .pageOut
                case .free: .free
                case .guardInstall: .guardInstall
                case .guardRemove: .guardRemove
                }
            try space(process).advise(range(pages), modelled)
        case .remap(let process, let pages, let count, let target):
            try space(process).remap(range(pages), length: UInt64(count) * pageSize, to: target.map(address))
        case .load(let process, let page, let word): return access(process, page, word, nil)
        case .store(let process, let page, let word, let value): return access(process, page, word, value)
        case .fork(let process, let child): processes[child] = try space(process).fork()
        case .end(let process):
            space(process).exit()
            processes[process] = nil
        case .raw(let process, let call): try perform(call, SystemCalls(space(process)))
        case .truncate(let file, let bytes): files[file].truncate(toBytes: bytes)
        case .punchHole(let file, let pages): files[file].punchHole(pages)
        case .readFile(let file, let page, let word):
            let readable = min(8, files[file].sizeInBytes - (page * Int(pageSize) + word * 8))
            guard readable == 8 else { return .short(max(0, readable)) }
            return .value(try files[file].read(page: page, offset: word * 8))
        case .writeFile(let file, let page, let word, let value):
            let end = page * Int(pageSize) + word * 8 + 8
            if end > files[file].sizeInBytes { files[file].truncate(toBytes: end) }
            try files[file].write(page: page, offset: word * 8, value)
            return .value(value)
        }
        return .done
    }

    private func perform(_ call: RawCall, _ calls: SystemCalls) throws(Errno) {
        switch call.name {
        case .mmap:
            try calls.mmap(
                call.address, call.length, protection: call.argument, flags: call.flags,
                object: call.file.map { files[$0] }, offset: call.last)
        case .munmap: try calls.munmap(call.address, call.length)
        case .mprotect: try calls.mprotect(call.address, call.length, call.argument)
        case .madvise: try calls.madvise(call.address, call.length, call.argument)
        case .mremap:
            try calls.mremap(call.address, call.length, call.argument, flags: call.flags, newAddress: call.last)
        }
    }

    private func access(_ process: Int, _ page: Int, _ word: Int, _ value: UInt64?) -> HostAnswer {
        do throws(UserFault) {
            return .value(try space(process).access(address(page) + UInt64(word * 8), store: value))
        } catch {
            switch error {
            case .segmentation: return .segmentationFault
            case .bus, .poisoned: return .busError
            case .outOfMemory: return .error(.ENOMEM)
            case .killed: return .error(.EINTR)
            }
        }
    }

    func look(_ process: Int) -> [PageView] {
        let space = space(process)
        return (0..<Self.windowPages).map { page in
            var view = PageView()
            space.mmapLock.lockForRead()
            if let vma = space.vmaLookup(address(page)) {
                view.area = Self.area(vma, isFirst: vma.range.lowerBound == address(page))
            }
            space.mmapLock.unlockRead()
            let state = space.pageMapEntry(address(page))
            view.isPresent = state.isPresent
            view.isSwapped = state.isSwapped
            view.isGuard = state.isGuard
            view.isFile = state.isFile
            view.isExclusive = state.isExclusive
            return view
        }
    }

    private static func area(_ vma: VMAInfo, isFirst: Bool) -> PageView.Area {
        var area = PageView.Area()
        area.rights = vma.flags.protection
        area.isShared = vma.flags.shared
        area.isAccounted = vma.flags.accounted
        area.hugePage = vma.flags.hugePage
        area.noHugePage = vma.flags.noHugePage
        area.isMergeable = vma.flags.mergeable
        area.isLocked = vma.flags.locked
        area.mayHoldGuards = vma.mayHoldGuards
        area.isFirst = isFirst
        return area
    }
}
