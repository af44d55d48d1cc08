import Audit
import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine

/// A VM with private memory: files, slots that bind them, attributes. When it goes, every file is closed, and nothing may
/// be left: no reference, no frame.
final class PrivateGuest: @unchecked Sendable {
    // Unchecked: as TestGuest.
    let guest: TestGuest
    /// Frames that stay out of the allocator for good: broken ones.
    var brokenFrames = 0
    private var open: [GuestMemoryFile] = []

    var vm: VirtualMachine { guest.vm }
    var test: TestHost { guest.test }
    var memory: PhysicalMemory { guest.test.memory }

    init(
        policy: PolicyName = .precise, ramFrames: Int = 384, thp: Bool = false, cpus: Int = 1,
        type: VirtualMachineType = .softwareProtected
    ) {
        guest = TestGuest(policy: policy, ramFrames: ramFrames, thp: thp, cpus: cpus, type: type)
    }

    deinit {
        takeDown()
    }

    /// Closes every file and ends the VM; expects that nothing is left.
    func takeDown() {
        for file in open { file.closeDescriptor() }
        open = []
        guest.takeDown()
        #expect(guest.framesAtStart - memory.freeFrames == brokenFrames, "frames leaked")
        #expect(test.journal.holdings.isEmpty)
    }

    // MARK: Files and slots

    /// A file that is closed with the guest, unless the test does it with `close`.
    func file(_ pages: Int) throws(Errno) -> GuestMemoryFile {
        let file = try vm.createGuestMemory(size: UInt64(pages) * pageSize)
        open.append(file)
        return file
    }

    func close(_ file: GuestMemoryFile) {
        open.removeAll { $0 === file }
        file.closeDescriptor()
    }

    func region(
        _ file: GuestMemoryFile, _ id: UInt32 = 0, guest: Int = 0, pages: Int, offset: Int = 0
    ) -> MemoryRegion {
        MemoryRegion(
            slot: id, flags: SlotFlags(guestMemory: true), guestAddress: gfn(guest).address,
            size: UInt64(pages) * pageSize, userAddress: at(guest), guestMemory: .file(file),
            guestMemoryOffset: UInt64(offset) * pageSize)
    }

    /// A slot over user memory `at(guest)` and the file's pages from `offset` on.
    func bind(
        _ file: GuestMemoryFile, _ id: UInt32 = 0, guest: Int = 0, pages: Int, offset: Int = 0
    ) throws(Errno) {
        try vm.setMemoryRegion(region(file, id, guest: guest, pages: pages, offset: offset))
    }

    /// A file of `pages` pages that slot 0 shows, over user memory of as many; `privates` are private.
    func bound(_ pages: Int, private privates: Range<Int>) throws -> GuestMemoryFile {
        let file = try file(pages)
        try guest.space.mapPages(0, pages)
        try bind(file, pages: pages)
        try makePrivate(privates)
        return file
    }

    func makePrivate(_ pages: Range<Int>, _ isPrivate: Bool = true) throws(Errno) {
        guard !pages.isEmpty else { return }
        try vm.setMemoryAttributes(
            address: gfn(pages.lowerBound).address.value, size: UInt64(pages.count) * pageSize,
            isPrivate ? .isPrivate : .none)
    }

    func punch(_ file: GuestMemoryFile, _ pages: Range<Int>) throws(Errno) {
        try file.allocate(
            .keepSizeAndPunchHole, offset: UInt64(pages.lowerBound) * pageSize,
            length: UInt64(pages.count) * pageSize)
    }

    // MARK: Faults

    /// One fault as the MMU gets it; may say itself what it wants.
    func fault(_ page: Int, _ access: AccessKind = .read, private isPrivate: Bool? = nil) -> FaultOutcome {
        guest.cpus[0].memoryFault = nil
        let outcome = vm.withSlots {
            vm.mmu.handleFault(
                guest.cpus[0],
                GuestFault(address: gfn(page).address, access: access, entryPresent: false, isPrivate: isPrivate))
        }
        vm.runPostponedWork()
        return outcome
    }

    /// A fault in the middle of what holds locks: the work that it leaves is somebody else's.
    func faultOnly(_ page: Int) -> FaultOutcome {
        vm.withSlots {
            vm.mmu.handleFault(
                guest.cpus[0], GuestFault(address: gfn(page).address, access: .write, entryPresent: false))
        }
    }

    var memoryFault: MemoryFaultExit? { guest.cpus[0].memoryFault }

    /// `privatePage` of a page of slot 0, released; its errno, or nil.
    func pageError(_ page: Int, in slot: MemorySlot? = nil) -> Errno? {
        let error: Errno? = vm.withSlots {
            guard let slot = slot ?? vm.slot(containing: gfn(page)) else { return .ENOENT }
            do throws(Errno) {
                let page = try vm.privatePage(of: gfn(page), in: slot)
                page.releaseUnused()
                return nil
            } catch {
                return error
            }
        }
        vm.runPostponedWork()
        return error
    }

    /// The rules at rest.
    func check() { guest.check() }
}

/// The errno that `body` throws, or nil.
func errno(_ body: () throws(Errno) -> Void) -> Errno? {
    do throws(Errno) {
        try body()
        return nil
    } catch {
        return error
    }
}
