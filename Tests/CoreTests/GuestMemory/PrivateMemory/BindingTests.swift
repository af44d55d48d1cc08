import Audit
import Frames
import HostMemory
import Synchronization
import Testing

@testable import GuestMemory
@testable import Machine

@Suite struct I25_BindingsAreExact {
    /// Rows 4, 8, 14, 14b and 19 of spec section 4.4.
    @Test func `every wrong binding has its errno and changes nothing`() throws {
        let guest = PrivateGuest()
        let file = try guest.file(8)
        let other = PrivateGuest()
        let foreign = try other.file(8)
        func set(_ change: (inout MemoryRegion) -> Void) -> Errno? {
            var region = guest.region(file, pages: 4)
            change(&region)
            return errno { () throws(Errno) in try guest.vm.setMemoryRegion(region) }
        }
        #expect(set { $0.flags.logDirtyPages = true } == .EINVAL)
        #expect(set { $0.flags.readOnly = true } == .EINVAL)
        #expect(set { $0.guestMemoryOffset = 1 } == .EINVAL)
        #expect(set { $0.guestMemoryOffset = 0 &- pageSize } == .EINVAL)
        #expect(set { $0.guestMemoryOffset = 1 << 63 } == .EINVAL)
        #expect(set { $0.guestMemoryOffset = 5 * pageSize } == .EINVAL)
        #expect(set { $0.size = 9 * pageSize } == .EINVAL)
        #expect(set { $0.guestMemory = .closed } == .EBADF)
        #expect(set { $0.guestMemory = .otherFile } == .EINVAL)
        #expect(set { $0.guestMemory = .file(foreign) } == .EINVAL)
        // A bad descriptor counts only after the shape (row 19 after row 8), and a bad shape fails a delete, too.
        #expect(
            set {
                $0.guestMemory = .closed
                $0.guestMemoryOffset = 1
            } == .EINVAL)
        #expect(guest.vm.activeSlots.isEmpty && file.bindings.isEmpty)
        #expect(set { _ in } == nil)
        #expect(
            set {
                $0.size = 0
                $0.guestMemoryOffset = 1
            } == .EINVAL)
        // The slot is there: nothing of it can change, with the flag (row 14) or without (row 14b).
        #expect(set { _ in } == .EINVAL)
        #expect(set { $0.guestAddress = gfn(64).address } == .EINVAL)
        #expect(set { $0.flags = SlotFlags() } == .EINVAL)
        #expect(set { $0.flags = SlotFlags(logDirtyPages: true) } == .EINVAL)
        #expect(
            set {
                $0.flags = SlotFlags()
                $0.guestAddress = gfn(64).address
            } == .EINVAL)
        // A slot without the flag gets none.
        try guest.guest.setSlot(1, guest: 16, pages: 4)
        #expect(
            set {
                $0.slot = 1
                $0.guestAddress = gfn(16).address
                $0.userAddress = at(16)
                $0.guestMemoryOffset = 4 * pageSize
            } == .EINVAL)
        guest.check()
        #expect(file.bindings.count == 1)
    }

    @Test func `a closed file is no file`() throws {
        let guest = PrivateGuest()
        let file = try guest.vm.createGuestMemory(size: 4 * pageSize)
        file.closeDescriptor()
        #expect(errno { () throws(Errno) in try guest.bind(file, pages: 4) } == .EBADF)
        #expect(errno { () throws(Errno) in try file.duplicate() } == .EBADF)
    }

    /// Every pair of ranges of a file of four pages.
    @Test func `a page of a file is bound once`() throws {
        let ranges = (0..<4).flatMap { low in (low + 1...4).map { low..<$0 } }
        for first in ranges {
            for second in ranges {
                let guest = PrivateGuest()
                let file = try guest.file(4)
                try guest.bind(file, 0, guest: 0, pages: first.count, offset: first.lowerBound)
                let result = errno { () throws(Errno) in
                    try guest.bind(file, 1, guest: 8, pages: second.count, offset: second.lowerBound)
                }
                #expect(result == (first.overlaps(second) ? .EINVAL : nil), "\(first) \(second)")
                #expect(file.bindings.count == (result == nil ? 2 : 1))
                #expect(guest.vm.checkBindings().isEmpty)
                // What was deleted can be bound again.
                try guest.guest.deleteSlot(0)
                try guest.bind(file, 2, guest: 16, pages: first.count, offset: first.lowerBound)
                #expect(guest.vm.checkBindings().isEmpty)
            }
        }
    }

    @Test func `a slot that the MMU refuses leaves no binding`() throws {
        let guest = PrivateGuest()
        let file = try guest.file(4)
        var region = guest.region(file, pages: 4)
        region.guestAddress = GuestAddress(1 << 48)
        #expect(errno { () throws(Errno) in try guest.vm.setMemoryRegion(region) } == .EINVAL)
        #expect(file.bindings.isEmpty)
        try guest.bind(file, pages: 4)
        guest.check()
    }

    @Test func `without memory for the slot nothing is bound`() throws {
        let guest = PrivateGuest()
        let file = try guest.file(4)
        guest.memory.failAllocation(1)
        #expect(errno { () throws(Errno) in try guest.bind(file, pages: 4) } == .ENOMEM)
        #expect(file.bindings.isEmpty)
        try guest.bind(file, pages: 4)
        // A delete that fails leaves the binding.
        guest.memory.failAllocation(1)
        #expect(errno { () throws(Errno) in try guest.guest.deleteSlot() } == .ENOMEM)
        #expect(file.bindings.count == 1 && guest.vm.checkBindings().isEmpty)
    }

    @Test func `closing the file unmaps all of it and leaves slots without private memory`() throws {
        let guest = PrivateGuest()
        let file = try guest.bound(4, private: 0..<2)
        for page in 0..<4 { guest.guest.store(page, 9) }
        try file.duplicate()
        guest.close(file)
        #expect(guest.guest.leaf(0) != nil)
        let free = guest.memory.freeFrames
        file.closeDescriptor()
        // Shared pages of the slot's frames went with it, and come back; private ones are gone.
        #expect(guest.memory.freeFrames == free + 2)
        #expect(guest.guest.leafCount == 0)
        #expect(guest.vm.guestMemoryFiles.isEmpty)
        #expect(guest.guest.load(0) == .failed(.EFAULT) && guest.memoryFault?.isPrivate == true)
        #expect(guest.guest.load(3) == .value(9))
        guest.check()
        try guest.guest.deleteSlot()
        guest.check()
    }

    @Test func `a VM outlives its descriptor until its last file is closed`() throws {
        let guest = PrivateGuest()
        let first = try guest.bound(4, private: 0..<4)
        let second = try guest.file(4)
        guest.guest.store(1, 1)
        guest.vm.destroy()
        #expect(guest.guest.leafCount == 1 && !guest.vm.activeSlots.isEmpty)
        guest.close(first)
        #expect(guest.guest.leafCount == 0 && !guest.vm.activeSlots.isEmpty)
        guest.close(second)
        #expect(guest.vm.activeSlots.isEmpty)
    }

    @Test func `the process may go before the VM's last file`() throws {
        let guest = PrivateGuest()
        _ = try guest.bound(4, private: 0..<4)
        guest.guest.store(1, 1)
        guest.vm.destroy()
        guest.guest.space.exit()
        #expect(guest.guest.leafCount == 0)
    }

    /// The first hole of Linux 6.13: the slot goes while the file's count is 0 and its release has not run.
    @Test func `a slot that goes while its file is dying is in no binding`() throws {
        let guest = PrivateGuest()
        let file = try guest.bound(4, private: 0..<4)
        try file.duplicate()
        guest.close(file)
        guest.guest.store(0, 1)
        #expect(file.drop())
        // Dying: nobody gets a page, and the slot goes.
        #expect(guest.pageError(0) == .EFAULT)
        let slot = try #require(guest.vm.slot(containing: gfn(0)))
        try guest.guest.deleteSlot()
        #expect(file.bindings.isEmpty && slot.guestMemory?.isBound == false)
        #expect(guest.vm.checkBindings().isEmpty)
        file.release()
        guest.check()
    }

    /// The same wherever between the last reference and the release the deletion comes.
    @Test func `deletion and the file's release in every order`() throws {
        for point in 0..<40 {
            let guest = PrivateGuest()
            let file = try guest.bound(4, private: 0..<4)
            try file.duplicate()
            guest.close(file)
            guest.guest.store(0, 1)
            let interposer = Interposer(point) {
                #expect(errno { () throws(Errno) in try guest.guest.deleteSlot() } == nil)
                #expect(guest.vm.checkBindings().isEmpty)
            }
            interposer.run { file.closeDescriptor() }
            guest.check()
            if !interposer.hasFired {
                #expect(point > 3)
                return
            }
        }
        Issue.record("the release has more points than were tried")
    }

    /// The second hole: the flag is dropped by a change of flags, and the binding stays.
    @Test func `a slot keeps its file as long as it lives`() throws {
        let guest = PrivateGuest()
        let file = try guest.bound(4, private: 0..<4)
        let slot = try #require(guest.vm.slot(containing: gfn(0)))
        var region = guest.region(file, pages: 4)
        region.flags = SlotFlags(logDirtyPages: true)
        #expect(errno { () throws(Errno) in try guest.vm.setMemoryRegion(region) } == .EINVAL)
        #expect(guest.vm.slot(containing: gfn(0)) === slot)
        try guest.guest.deleteSlot()
        #expect(file.bindings.isEmpty)
        guest.check()
    }

    // MARK: The checker sees each break.

    private func findings(_ breaking: (PrivateGuest, GuestMemoryFile, MemorySlot) throws -> Void) throws -> [Finding] {
        let guest = PrivateGuest()
        let file = try guest.bound(4, private: 0..<4)
        let slot = try #require(guest.vm.slot(containing: gfn(0)))
        guest.guest.store(0, 1)
        #expect(guest.vm.checkBindings().isEmpty)
        try breaking(guest, file, slot)
        return guest.vm.checkBindings()
    }

    @Test func `the checker finds a slot that was not unbound`() throws {
        let found = try findings { guest, file, slot in
            // As 6.13 leaves it: the slot is gone, the binding is not.
            let bindings = file.bindings
            try guest.guest.deleteSlot()
            file.setBindings(bindings)
        }
        #expect(found.map(\.reason) == ["a binding has a slot that is gone"])
    }

    @Test func `the checker finds a slot whose file is gone or does not know it`() throws {
        let unknown = try findings { _, file, _ in file.setBindings([]) }
        #expect(unknown.map(\.reason) == ["a slot's file does not know the slot's pages"])
        let forgotten = try findings { _, _, slot in slot.guestMemory?.forgetFile() }
        #expect(forgotten.contains { $0.reason == "a binding has a slot that does not know it" })
        let stale = try findings { guest, file, slot in
            guest.close(file)
            slot.guestMemory?.remember(file)
        }
        #expect(stale.map(\.reason) == ["a slot has a file that is gone"])
    }

    @Test func `the checker finds an entry that outlives its page or its attribute`() throws {
        let removed = try findings { _, file, _ in file.removePages(0..<4) }
        #expect(removed.map(\.reason) == ["a private frame maps what its file does not have"])
        let shared = try findings { guest, _, _ in
            guest.vm.privateMemory.attributes.store(gfn(0)..<gfn(1), isPrivate: false)
        }
        #expect(shared.map(\.reason) == ["a shared frame maps a private page"])
    }
}
