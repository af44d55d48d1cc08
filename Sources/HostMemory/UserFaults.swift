import Audit
import Frames
import Synchronization
import Synchrony

/// Page faults that another task of the process serves: where nothing is yet, where the page is there but not mapped, or
/// where a write was forbidden. Kernel: a userfaultfd.
///
/// A task that faults leaves a message and sleeps. Whoever serves reads the messages, puts pages in place with `copy`,
/// `zero`, `map` or `protect`, which wake it, and it faults again.
public final class UserFaults: @unchecked Sendable {
    // Unchecked: `messages` and `served` are touched only under `lock`; `whenWaiting` is set before the first fault.
    public struct Modes: OptionSet, Sendable {
        public let rawValue: UInt8
        public init(rawValue: UInt8) { self.rawValue = rawValue }
        /// Kernel: `UFFDIO_REGISTER_MODE_MISSING`.
        public static let missing = Modes(rawValue: 1)
        /// Kernel: `UFFDIO_REGISTER_MODE_MINOR`; shared memory only.
        public static let minor = Modes(rawValue: 2)
        /// Kernel: `UFFDIO_REGISTER_MODE_WP`.
        public static let writeProtect = Modes(rawValue: 4)
    }

    /// Kernel: `uffd_msg` of a page fault.
    public struct Message: Sendable, Equatable {
        public let mode: Modes
        /// Page-aligned.
        public let address: UserAddress
        public let write: Bool
    }

    public unowned(unsafe) let space: AddressSpace
    private let lock = SpinLock(.objectIndex)
    private var messages: [Message] = []
    /// Shared by all who serve faults of the space: signals find whoever faults there.
    private var faulting: SleepQueue { space.signals.sleepers }
    private let reading = SleepQueue()
    /// What a task that is about to sleep does first, again and again until it need not sleep: where one task plays all
    /// parts, it serves the fault itself, or gives up by `abandon`.
    public var whenWaiting: (() -> Void)?
    /// Nobody serves any more.
    let isAbandoned = Atomic<Bool>(false)

    /// Of one address space, which must outlive it.
    public init(of space: AddressSpace) { self.space = space }

    // MARK: Who serves

    /// The oldest message that nobody has read. Nil: there is none. Kernel: `read`, non-blocking.
    public func nextMessage() -> Message? {
        lock.lock()
        defer { lock.unlock() }
        return messages.isEmpty ? nil : messages.removeFirst()
    }

    /// The same, but sleeps until there is one. Nil: nobody serves any more. Kernel: `read`.
    public func waitForMessage() -> Message? {
        var found: Message?
        reading.wait {
            found = nextMessage()
            return found != nil || isAbandoned.load(ordering: .acquiring)
        }
        return found
    }

    /// Whoever waits, and whoever comes from now on, gets SIGBUS: a server that died without leaving the process its memory.
    public func abandon() {
        isAbandoned.store(true, ordering: .releasing)
        faulting.wake()
        reading.wake()
    }

    /// Lets the tasks that wait look again. Kernel: `UFFDIO_WAKE`.
    public func wake() { faulting.wake() }

    // MARK: Who faults

    /// Leaves a message and sleeps until the fault is served or a fatal signal comes, with `interruptible` any signal. No
    /// lock held. Kernel: `handle_userfault`, `userfaultfd_get_blocking_state`.
    func wait(_ message: Message, interruptible: Bool) {
        lock.lock()
        if !messages.contains(message) { messages.append(message) }
        lock.unlock()
        reading.wake()
        // It may have to be asked more than once: a task that ran for this one may have sent a signal and no page.
        while let whenWaiting, !isOver(message, interruptible) { whenWaiting() }
        faulting.wait { isOver(message, interruptible) }
        lock.lock()
        messages.removeAll { $0 == message }
        lock.unlock()
    }

    private func isOver(_ message: Message, _ interruptible: Bool) -> Bool {
        let signals = space.signals
        return isServed(message) || (interruptible ? signals.pending : signals.fatal)
            || isAbandoned.load(ordering: .acquiring)
    }

    /// Kernel: `userfaultfd_must_wait`.
    private func isServed(_ message: Message) -> Bool {
        guard let leaf = space.leaf(message.address) else { return false }
        if message.mode == .writeProtect { return !leaf.entry.mapsFrame || !leaf.entry.isUserProtected }
        return leaf.entry.bits != 0
    }
}

// MARK: Registering

extension AddressSpace {
    /// Faults of these kinds in `range` go to `faults` from now on. Errors: EINVAL for a bad range, no kinds, a driver's
    /// mapping, or minor faults on what is not shared memory; ENOMEM for a hole; EBUSY where another serves.
    /// Kernel: `UFFDIO_REGISTER`.
    public func register(_ range: Range<UserAddress>, _ modes: UserFaults.Modes, _ faults: UserFaults) throws(Errno) {
        guard Self.isUsable(range), !modes.isEmpty else { throw .EINVAL }
        mmapLock.lockForWrite()
        defer { mmapLock.unlockWrite() }
        if hasHole(range) { throw .ENOMEM }
        let first = firstIndex(endingAfter: range.lowerBound)
        for vma in vmas[first...] where vma.range.lowerBound < range.upperBound {
            if let other = vma.userFaults, other.server !== faults { throw .EBUSY }
            switch vma.backing {
            case .anonymous: if modes.contains(.minor) { throw .EINVAL }
            case .object(let object, _, let shared):
                if object.disk != nil || (modes.contains(.minor) && !shared) { throw .EINVAL }
            case .anonymousShared, .driver, .huge: throw .EINVAL
            }
        }
        for vma in vmas[splitting(range)] { vma.userFaults = UserFaultRegistration(server: faults, modes: modes) }
    }

    /// Kernel: `UFFDIO_UNREGISTER`. Errors: EINVAL for a bad range.
    public func unregister(_ range: Range<UserAddress>) throws(Errno) {
        guard Self.isUsable(range) else { throw .EINVAL }
        mmapLock.lockForWrite()
        defer { mmapLock.unlockWrite() }
        for vma in vmas[splitting(range)] {
            guard let registration = vma.userFaults else { continue }
            forEachSmall(in: vma.range) { word, _ in _ = word.fetchAnd(~HostEntry.userProtected) }
            vma.userFaults = nil
            registration.server.wake()
        }
    }
}

/// Who serves an area's faults, and which.
struct UserFaultRegistration {
    let server: UserFaults
    let modes: UserFaults.Modes

    static func isSame(_ one: UserFaultRegistration?, _ other: UserFaultRegistration?) -> Bool {
        switch (one, other) {
        case (nil, nil): true
        case (let one?, let other?): one.server === other.server && one.modes == other.modes
        default: false
        }
    }
}

// MARK: Serving

extension UserFaults {
    /// Puts a page with the 4096 bytes at `bytes` where nothing is. Errors: ENOENT where this one doesn't serve; EEXIST
    /// where something is; EINVAL for a misaligned address; ENOMEM. Kernel: `UFFDIO_COPY`.
    public func copy(_ bytes: UnsafeRawPointer, to address: UserAddress, protected: Bool = false) throws(Errno) {
        try serve(address) { (vma, word) throws(Errno) in
            switch vma.backing {
            case .object(let object, _, true):
                try object.install(bytes, at: vma.backingPage(of: address))
                try space.mapServed(vma, object, address, word, protected: protected)
            default: try space.installServed(vma, bytes, address, word, protected: protected)
            }
        }
    }

    /// Puts the page of zeros where nothing is, in anonymous memory; else a new page of zeros. Errors as `copy`.
    /// Kernel: `UFFDIO_ZEROPAGE`.
    public func zero(_ address: UserAddress) throws(Errno) {
        try serve(address) { (vma, word) throws(Errno) in
            guard case .anonymous = vma.backing else { throw .EINVAL }
            try space.installZeroPage(vma, address, word)
        }
    }

    /// Maps the page of the shared memory that is there already. Errors as `copy`; EFAULT if it isn't there.
    /// Kernel: `UFFDIO_CONTINUE`.
    public func map(_ address: UserAddress) throws(Errno) {
        try serve(address) { (vma, word) throws(Errno) in
            guard case .object(let object, _, true) = vma.backing else { throw .EINVAL }
            guard object.isPresent(vma.backingPage(of: address)) else { throw .EFAULT }
            try space.mapServed(vma, object, address, word, protected: false)
        }
    }

    /// Forbids writes to the pages of `range` that are there, or allows them again. Errors: EINVAL for a bad range; ENOENT
    /// where this one doesn't serve writes. Kernel: `UFFDIO_WRITEPROTECT`.
    public func protect(_ range: Range<UserAddress>, _ on: Bool) throws(Errno) {
        guard AddressSpace.isUsable(range) else { throw .EINVAL }
        space.mmapLock.lockForRead()
        defer {
            space.mmapLock.unlockRead()
            if !on { wake() }
        }
        guard !space.hasHole(range) else { throw .ENOENT }
        let first = space.firstIndex(endingAfter: range.lowerBound)
        for vma in space.vmas[first...] where vma.range.lowerBound < range.upperBound {
            guard let registration = vma.userFaults, registration.server === self,
                registration.modes.contains(.writeProtect)
            else { throw .ENOENT }
        }
        space.notifyStart(range)
        space.forEachSmall(in: range, splitsZeros: true) { word, _ in
            let seen = HostEntry(word.peek())
            guard seen.mapsFrame || seen.isSwapped || seen.isMigrating else { return }
            if on {
                _ = word.fetchOr(HostEntry.userProtected)
                if seen.mapsFrame { _ = word.fetchAnd(~HostEntry.writable) }
            } else {
                // The right to write comes back with the next write.
                _ = word.fetchAnd(~HostEntry.userProtected)
            }
        }
        space.notifyEnd(range)
    }

    private func serve(
        _ address: UserAddress, _ body: (VMA, AtomicWord) throws(Errno) -> Void
    ) throws(Errno) {
        guard address.offset == 0 else { throw .EINVAL }
        space.mmapLock.lockForRead()
        defer {
            space.mmapLock.unlockRead()
            wake()
        }
        guard let vma = space.find(address), let registration = vma.userFaults, registration.server === self else {
            throw .ENOENT
        }
        guard let middle = space.makeMiddleEntry(address) else { throw .ENOMEM }
        let last = space.makeLastEntry(address, in: middle.word)
        if last.isLeaf { throw .EEXIST }
        guard let word = last.word else { throw .ENOMEM }
        if word.load() != 0 { throw .EEXIST }
        try body(vma, word)
    }
}

extension AddressSpace {
    fileprivate func installServed(
        _ vma: VMA, _ bytes: UnsafeRawPointer, _ address: UserAddress, _ word: AtomicWord, protected: Bool
    ) throws(Errno) {
        prepareAnonymous(vma)
        guard let frame = newAnonymousPage(vma.backingPage(of: address)) else { throw .ENOMEM }
        memory.willWrite(frame)
        memory.bytes(of: frame).copyMemory(from: bytes, byteCount: Int(pageSize))
        var entry = HostEntry.leaf(frame, vma.flags, writable: vma.flags.write && !protected)
        entry = entry.setting(HostEntry.dirty | (protected ? HostEntry.userProtected : 0))
        pageTableLock.lock()
        let won = word.load() == 0
        if won { setNewLeaf(word, entry, address) }
        pageTableLock.unlock()
        guard won else {
            memory.put(memory.page(frame))
            throw .EEXIST
        }
    }

    fileprivate func installZeroPage(_ vma: VMA, _ address: UserAddress, _ word: AtomicWord) throws(Errno) {
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        guard word.load() == 0 else { throw .EEXIST }
        setLeaf(word, HostEntry.leaf(host.zeroPage, vma.flags, writable: false, special: true), address)
    }

    /// Maps a page of shared memory that is there.
    fileprivate func mapServed(
        _ vma: VMA, _ object: MemoryObject, _ address: UserAddress, _ word: AtomicWord, protected: Bool
    ) throws(Errno) {
        guard let page = object.takeIfPresent(vma.backingPage(of: address)) else { throw .EFAULT }
        var entry = HostEntry.leaf(
            memory.frame(of: page), vma.flags, writable: vma.entriesAreWritable && !protected)
        entry = entry.setting(HostEntry.dirty | (protected ? HostEntry.userProtected : 0))
        pageTableLock.lock()
        let won = word.load() == 0 && object.holds(page, at: vma.backingPage(of: address))
        if won {
            page.pointee.mapCount.add(1, ordering: .relaxed)
            setLeaf(word, entry, address)
        }
        pageTableLock.unlock()
        guard won else {
            memory.put(page)
            throw .EEXIST
        }
    }

    /// The message that a fault where nothing is mapped leaves, if somebody serves it. Kernel: `userfaultfd_missing`,
    /// `userfaultfd_minor`.
    func userFault(_ vma: VMA, _ address: UserAddress, _ access: FaultAccess) -> FaultOutcome? {
        guard let registration = vma.userFaults else { return nil }
        let mode: UserFaults.Modes
        if case .object(let object, _, _) = vma.backing {
            mode = object.isHole(vma.backingPage(of: address)) ? .missing : .minor
        } else {
            mode = .missing
        }
        return ask(registration, mode, address, access)
    }

    /// The same for a write to an entry that is write-protected on the server's behalf. Kernel: `userfaultfd_pte_wp`.
    func userFault(_ vma: VMA, _ address: UserAddress, protected entry: HostEntry) -> FaultOutcome? {
        guard entry.isUserProtected, let registration = vma.userFaults else { return nil }
        return ask(registration, .writeProtect, address, .write)
    }

    private func ask(
        _ registration: UserFaultRegistration, _ mode: UserFaults.Modes, _ address: UserAddress, _ access: FaultAccess
    ) -> FaultOutcome? {
        guard registration.modes.contains(mode) else { return nil }
        if registration.server.isAbandoned.load(ordering: .acquiring) { return .failed(.bus) }
        let page = address.aligned(to: .page4K)
        return .waitForUser(
            registration.server, UserFaults.Message(mode: mode, address: page, write: access == .write))
    }
}

extension MemoryObject {
    /// Puts a page with these bytes where none is. Errors: EEXIST; EFAULT beyond the end; ENOMEM.
    fileprivate func install(_ bytes: UnsafeRawPointer, at index: Int) throws(Errno) {
        guard isHole(index) else { throw index < pages ? .EEXIST : .EFAULT }
        switch take(index) {
        case .page(let page):
            let frame = host.memory.frame(of: page)
            host.memory.willWrite(frame)
            host.memory.bytes(of: frame).copyMemory(from: bytes, byteCount: Int(pageSize))
            host.memory.mark(page, PageFlags.dirty(.driver))
            host.memory.put(page)
        case .mustWait, .unreadable: throw .EIO
        case .beyondEnd: throw .EFAULT
        case .outOfMemory: throw .ENOMEM
        case .poisoned: throw .EHWPOISON
        }
    }

    fileprivate func isPresent(_ index: Int) -> Bool { frame(of: index) != nil }
}
