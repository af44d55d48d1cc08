import Audit
import Frames
import Testing

@testable import GuestMemory
@testable import HostMemory
@testable import Machine

@Suite struct G2_15_GuestMemoryFile {
    @Test func `a file has a size of whole pages and no flags`() throws {
        let guest = PrivateGuest()
        func create(_ size: UInt64, flags: UInt64 = 0) -> Errno? {
            errno { () throws(Errno) in
                let file = try guest.vm.createGuestMemory(size: size, flags: flags)
                file.closeDescriptor()
            }
        }
        #expect(create(pageSize) == nil)
        #expect(create(pageSize, flags: 1) == .EINVAL)
        #expect(create(pageSize, flags: 1 << 63) == .EINVAL)
        #expect(create(0) == .EINVAL)
        #expect(create(pageSize + 1) == .EINVAL)
        #expect(create(4095) == .EINVAL)
        // The size is signed.
        #expect(create(1 << 63) == .EINVAL)
        #expect(create(0 &- pageSize) == .EINVAL)
        #expect(create((1 << 63) - pageSize) == nil)
    }

    @Test func `a VM of any type has files`() throws {
        let guest = PrivateGuest(type: .standard)
        let file = try guest.file(4)
        try file.allocate(.keepSize, offset: 0, length: pageSize)
        #expect(file.presentPages == 1)
        #expect(errno { () throws(Errno) in try guest.bind(file, pages: 4) } == .EINVAL)
    }

    @Test func `its size is fixed and no process maps it`() throws {
        let guest = PrivateGuest()
        let file = try guest.file(4)
        #expect(errno { () throws(Errno) in try file.setSize(pageSize) } == .EINVAL)
        #expect(errno { () throws(Errno) in try file.map() } == .ENODEV)
        #expect(file.size == 4 * pageSize)
    }

    @Test func `allocation takes two modes and whole pages of the file`() throws {
        let guest = PrivateGuest()
        let file = try guest.file(4)
        func allocate(_ bits: UInt32, _ offset: UInt64, _ length: UInt64) -> Errno? {
            errno { () throws(Errno) in
                try file.allocate(AllocationMode(bits: bits), offset: offset, length: length)
            }
        }
        for bits in [UInt32(0), 2, 4, 5, 7, 8, 9, 0x11, 0x41] {
            #expect(allocate(bits, 0, pageSize) == .EOPNOTSUPP, "mode \(bits)")
        }
        for bits in [UInt32(1), 3] {
            #expect(allocate(bits, 1, pageSize) == .EINVAL)
            #expect(allocate(bits, 0, 1) == .EINVAL)
            #expect(allocate(bits, 0, 0) == .EINVAL)
            #expect(allocate(bits, 0, 1 << 63) == .EINVAL)
            #expect(allocate(bits, 1 << 63, pageSize) == .EINVAL)
        }
        #expect(allocate(1, pageSize, 4 * pageSize) == .EINVAL)
        #expect(allocate(1, 4 * pageSize, pageSize) == .EINVAL)
        #expect(file.presentPages == 0)
        #expect(allocate(1, pageSize, 3 * pageSize) == nil)
        #expect(file.presentPages == 3)
        // A hole may reach past the end: there is nothing.
        #expect(allocate(3, 2 * pageSize, 100 * pageSize) == nil)
        #expect(file.presentPages == 1 && file.frame(of: 1) != nil)
    }

    @Test func `allocation stops at a signal and without memory and keeps what it made`() throws {
        let guest = PrivateGuest()
        let file = try guest.file(8)
        guest.memory.failAllocation(3)
        #expect(errno { () throws(Errno) in try file.allocate(.keepSize, offset: 0, length: 8 * pageSize) } == .ENOMEM)
        #expect(file.presentPages == 2)
        guest.guest.space.signals.pending = true
        #expect(errno { () throws(Errno) in try file.allocate(.keepSize, offset: 0, length: 8 * pageSize) } == .EINTR)
        guest.guest.space.signals.pending = false
        #expect(file.presentPages == 2)
    }

    @Test func `what was allocated is prepared when the guest first needs it, and keeps its content`() throws {
        let guest = PrivateGuest()
        let file = try guest.bound(4, private: 0..<4)
        try file.allocate(.keepSize, offset: 0, length: 4 * pageSize)
        let frame = try #require(file.frame(of: 2))
        // The arena is full of rubbish; the guest reads zeros.
        #expect(guest.guest.load(2) == .value(0))
        #expect(guest.guest.store(2, 77) == .stored)
        #expect(guest.guest.leaf(2)?.frame == frame)
        guest.vm.mmu.flushAll()
        #expect(guest.guest.load(2) == .value(77))
        guest.check()
    }

    @Test func `a bound page that no file, slot or memory gives is an errno`() throws {
        let guest = PrivateGuest()
        let file = try guest.bound(4, private: 0..<4)
        try guest.guest.setSlot(1, guest: 8, pages: 4)
        // A slot without the flag.
        #expect(guest.pageError(8) == .EFAULT)
        guest.memory.failAllocation(1)
        #expect(guest.pageError(0) == .ENOMEM)
        #expect(guest.pageError(0) == nil)
        // The INVALID copy has no file.
        let slot = try #require(guest.vm.slot(containing: gfn(0)))
        #expect(guest.pageError(0, in: slot.invalidCopy()) == .EFAULT)
        // A slot that thinks it is bound, and is not; then one whose pages are another's.
        let stranger = MemorySlot(
            id: 9, baseFrame: gfn(0), pageCount: 4, userAddress: at(0), flags: SlotFlags(guestMemory: true),
            dirtyBitmap: nil, guestMemory: SlotGuestMemory(firstPage: 0))
        #expect(guest.pageError(0, in: stranger) == .EFAULT)
        stranger.guestMemory?.remember(file)
        #expect(guest.pageError(0, in: stranger) == .EIO)
        #expect(guest.test.journal.findings.map(\.invariant) == [.i25])
        guest.guest.expectedFindings = 1
        guest.close(file)
        #expect(guest.pageError(0) == .EFAULT)
    }

    @Test func `an unbound page of a file that knows no slot there is EIO without a warning`() throws {
        let guest = PrivateGuest()
        let file = try guest.file(4)
        let stranger = MemorySlot(
            id: 9, baseFrame: gfn(0), pageCount: 4, userAddress: at(0), flags: SlotFlags(guestMemory: true),
            dirtyBitmap: nil, guestMemory: SlotGuestMemory(firstPage: 0))
        stranger.guestMemory?.remember(file)
        #expect(guest.pageError(0, in: stranger) == .EIO)
    }

    @Test func `a broken page is unmapped, stays in the file and is EHWPOISON from then on`() throws {
        let guest = PrivateGuest()
        let file = try guest.bound(4, private: 0..<4)
        for page in 0..<4 { guest.guest.store(page, UInt64(page)) }
        let frame = try #require(file.frame(of: 1))
        #expect(guest.test.host.poison(frame))
        guest.brokenFrames = 1
        #expect(guest.guest.leaf(1) == nil && guest.guest.leaf(0) != nil && guest.guest.leaf(2) != nil)
        #expect(guest.pageError(1) == .EHWPOISON)
        #expect(guest.guest.load(1) == .failed(.EHWPOISON))
        #expect(file.frame(of: 1) == frame)
        guest.check()
        // A hole makes room for a sound one.
        try guest.punch(file, 1..<2)
        #expect(guest.guest.load(1) == .value(0))
        #expect(file.frame(of: 1) != frame)
        guest.check()
    }

    @Test func `a hole unmaps and frees its pages and no others`() throws {
        let guest = PrivateGuest()
        let file = try guest.bound(8, private: 0..<8)
        for page in 0..<8 { guest.guest.store(page, 5) }
        let free = guest.memory.freeFrames
        try guest.punch(file, 2..<5)
        #expect(guest.memory.freeFrames == free + 3)
        #expect((0..<8).filter { guest.guest.leaf($0) != nil } == [0, 1, 5, 6, 7])
        #expect(guest.guest.load(3) == .value(0) && guest.guest.load(5) == .value(5))
        guest.check()
    }

    @Test func `a file shows through slots at their offsets, in any order`() throws {
        let guest = PrivateGuest()
        let file = try guest.file(8)
        try guest.guest.space.mapPages(0, 16)
        try guest.bind(file, 0, guest: 0, pages: 2, offset: 4)
        try guest.bind(file, 1, guest: 8, pages: 4, offset: 0)
        try guest.bind(file, 2, guest: 4, pages: 2, offset: 6)
        try guest.makePrivate(0..<16)
        for page in [0, 1, 8, 9, 10, 11, 4, 5] { guest.guest.store(page, 1) }
        #expect(guest.guest.leaf(0)?.frame == file.frame(of: 4))
        #expect(guest.guest.leaf(9)?.frame == file.frame(of: 1))
        #expect(guest.guest.leaf(5)?.frame == file.frame(of: 7))
        guest.check()
        // A hole over the ends of two slots.
        try guest.punch(file, 3..<5)
        #expect(guest.guest.leaf(11) == nil && guest.guest.leaf(0) == nil)
        #expect(guest.guest.leaf(10) != nil && guest.guest.leaf(1) != nil)
        guest.check()
    }

    @Test func `private pages are neither reclaimed nor moved`() throws {
        let guest = PrivateGuest()
        let file = try guest.bound(4, private: 0..<4)
        guest.guest.store(0, 3)
        let frame = try #require(file.frame(of: 0))
        _ = guest.test.host.compact(order: 6)
        _ = guest.test.host.migrate(guest.guest.space, pages(0..<4))
        #expect(file.frame(of: 0) == frame && guest.guest.leaf(0)?.frame == frame)
        #expect(!guest.memory.isMovable(frame, count: 1))
        guest.check()
    }
}

@Suite struct G2_15_Populate {
    @Test func `pages are filled once, before the guest runs`() throws {
        let guest = PrivateGuest()
        _ = try guest.bound(8, private: 0..<4)
        func populate(_ first: Int, _ count: Int, _ error: Errno? = nil, at bad: Int = 0) -> Result<Int, Errno> {
            do throws(Errno) {
                return .success(
                    try guest.vm.populate(from: gfn(first), count: count) {
                        (frame, _, bytes) throws(Errno) in
                        if let error, frame == gfn(bad) { throw error }
                        bytes.initializeMemory(as: UInt64.self, repeating: frame.number, count: 512)
                    })
            } catch {
                return .failure(error)
            }
        }
        #expect(populate(0, -1) == .failure(.EINVAL))
        #expect(populate(100, 1) == .failure(.EINVAL))
        #expect(populate(0, 0) == .success(0))
        // Not private.
        #expect(populate(4, 1) == .failure(.EINVAL))
        #expect(populate(0, 2) == .success(2))
        #expect(populate(0, 2) == .failure(.EEXIST))
        // What was done counts; the error waits for a call that does nothing.
        #expect(populate(2, 6, .EPERM, at: 3) == .success(1))
        #expect(populate(3, 1, .EPERM, at: 3) == .failure(.EPERM))
        guest.guest.space.signals.pending = true
        #expect(populate(3, 1) == .failure(.EINTR))
        guest.guest.space.signals.pending = false
        #expect(populate(3, 1) == .success(1))
        for page in 0..<4 { #expect(guest.guest.load(page) == .value(gfn(page).number)) }
        // The slot's end is the end.
        try guest.makePrivate(4..<8)
        #expect(populate(6, 100) == .success(2))
        guest.check()
    }

    @Test func `without a file there is nothing to fill`() throws {
        let guest = PrivateGuest()
        let file = try guest.bound(4, private: 0..<4)
        try guest.guest.setSlot(1, guest: 8, pages: 4)
        let fill: (Int) -> Errno? = { page in
            errno { () throws(Errno) in
                _ = try guest.vm.populate(from: gfn(page), count: 1) { (_, _, _) throws(Errno) in }
            }
        }
        #expect(fill(8) == .EINVAL)
        guest.memory.failAllocation(1)
        #expect(fill(0) == .ENOMEM)
        guest.close(file)
        #expect(fill(0) == .EFAULT)
    }

    @Test func `a page that the architecture refuses is given to nobody and tried again`() throws {
        final class RefusingMMU: SecondaryMMU, @unchecked Sendable {
            // Unchecked: one task.
            var refusals = 1
            override var hasPrivateFaults: Bool { true }
            override func preparePrivatePage(_ page: HostFrame, at frame: GuestFrame) throws(Errno) {
                guard refusals > 0 else { return }
                refusals -= 1
                throw .EPERM
            }
        }
        let test = TestHost()
        let vm = VirtualMachine(addressSpace: test.space(), mmu: RefusingMMU(), type: .softwareProtected)
        let file = try vm.createGuestMemory(size: pageSize)
        try vm.setMemoryRegion(
            MemoryRegion(
                slot: 0, flags: SlotFlags(guestMemory: true), guestAddress: gfn(0).address, size: pageSize,
                userAddress: at(0), guestMemory: .file(file)))
        func take() -> Errno? {
            vm.withSlots {
                errno { () throws(Errno) in
                    try vm.privatePage(of: gfn(0), in: vm.slot(containing: gfn(0))!).releaseUnused()
                }
            }
        }
        #expect(take() == .EPERM)
        let frame = try #require(file.frame(of: 0))
        #expect(test.state(frame).referenceCount == 1 && test.journal.holdings.isEmpty)
        #expect(take() == nil)
        #expect(take() == nil)
        file.closeDescriptor()
        vm.destroy()
    }
}
