import Audit
import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Paging

extension TestGuest {
    /// Eight pages in a logged slot: 0 APIC access, 1 virtual APIC, 2 descriptor, 3 MSR bitmap.
    fileprivate static func hypervisor() throws -> TestGuest {
        let guest = TestGuest()
        try guest.addMemory(0, 8, log: true)
        for page in 0..<8 { try guest.space.store(at(page), UInt64(page)) }
        _ = try guest.vm.getDirtyLog(slot: 0)
        return guest
    }

    /// Pages of the slot that are in the log now.
    fileprivate func dirty() throws -> [Int] {
        let words = try vm.getDirtyLog(slot: 0)
        return (0..<8).filter { words[0] >> UInt64($0) & 1 != 0 }
    }

    fileprivate func pins(_ page: Int) -> Int {
        guard let frame = frame(page) else { return 0 }
        return test.journal.holdings.filter { $0.frame == frame.number }.reduce(0) { $0 + $1.pins }
    }

    fileprivate func inSlots<R>(_ body: () -> R) -> R { vm.withSlots(body) }
}

private func controls(apic: Int? = 0, virtual: Int? = 1, posted: Int? = 2, bitmap: Int? = 3) -> NestedVMCS {
    var vmcs = NestedVMCS()
    vmcs.apicAccessPage = apic.map { gfn($0).address }
    vmcs.virtualAPICPage = virtual.map { gfn($0).address }
    vmcs.postedInterruptDescriptor = posted.map { GuestAddress(gfn($0).address.value + 64) }
    vmcs.msrBitmap = bitmap.map { gfn($0).address }
    return vmcs
}

private let nothing = [UInt64](repeating: 0, count: 512)
/// A page that no slot has.
private let nowhere = 100

/// x86 6.2, VMX: what is pinned while a nested guest runs, and what is dirtied when.
@Suite struct X6_2_NestedVMX {
    @Test func `hardware has the pages as long as they are pinned, and not an instant longer`() throws {
        let guest = try TestGuest.hypervisor()
        let nested = NestedVMX(guest.cpus[0])
        #expect(nested.merged == MergedVMCS())
        #expect(guest.inSlots { nested.enter(controls(), ownBitmap: nothing) } == .entered)
        let merged = nested.merged
        #expect(merged.apicAccessPage == guest.frame(0) && merged.virtualAPICPage == guest.frame(1))
        #expect(merged.postedInterruptDescriptor == guest.frame(2) && merged.usesTPRShadow && merged.usesMSRBitmap)
        #expect((0..<4).map(guest.pins) == [1, 1, 1, 0], "the bitmap is mapped for a moment")
        // Memory that is taken from the process stays what it is for the hardware.
        try guest.space.advise(pages(0..<3), .dontNeed)
        #expect(nested.merged == merged)
        guest.inSlots { nested.exitToHypervisor() }
        #expect(nested.merged == MergedVMCS() && guest.test.journal.holdings.isEmpty)
        guest.inSlots { nested.exitToHypervisor() }
        #expect(guest.test.journal.holdings.isEmpty, "X8: once more does nothing")
    }

    @Test func `X66: at every point of an entry and an exit hardware has pinned pages and no others`() throws {
        let guest = try TestGuest.hypervisor()
        let nested = NestedVMX(guest.cpus[0])
        var points = 0
        var named = 0
        let task = TestTask { _, _ in
            TestTask.elsewhere {
                let merged = nested.merged
                let frames = [merged.apicAccessPage, merged.virtualAPICPage, merged.postedInterruptDescriptor]
                for frame in frames.compactMap({ $0 }) {
                    named += 1
                    let held = guest.test.journal.holdings.filter { $0.frame == frame.number }
                    #expect(held.reduce(0) { $0 + $1.pins } == 1, "point \(points)")
                }
            }
            points += 1
        }
        _ = task.run {
            for page in 0..<3 {
                _ = guest.inSlots { nested.enter(controls(apic: page % 2, virtual: 1 - page % 2), ownBitmap: nothing) }
                _ = guest.inSlots { guest.vm.slot(containing: gfn(0)) }
                guest.inSlots { page == 2 ? nested.free() : nested.exitToHypervisor() }
            }
        }
        #expect(points > 50 && named > 0 && guest.test.journal.holdings.isEmpty)
    }

    @Test func `a writable map dirties its page when it ends, a bitmap that was read stays clean`() throws {
        let guest = try TestGuest.hypervisor()
        let nested = NestedVMX(guest.cpus[0])
        _ = guest.inSlots { nested.enter(controls(), ownBitmap: nothing) }
        #expect(try guest.dirty() == [])
        guest.inSlots { nested.leftGuest() }
        #expect(try guest.dirty() == [1, 2], "the processor wrote the virtual APIC and the descriptor")
        guest.inSlots { nested.exitToHypervisor() }
        #expect(try guest.dirty() == [0, 1, 2])
        guest.inSlots { nested.leftGuest() }
        #expect(try guest.dirty() == [], "no nested guest, no exit from one")
    }

    @Test func `without its APIC access page no nested guest runs, and nothing stays mapped`() throws {
        let guest = try TestGuest.hypervisor()
        let nested = NestedVMX(guest.cpus[0])
        #expect(guest.inSlots { nested.enter(controls(apic: nowhere), ownBitmap: nothing) } == .internalError)
        #expect(nested.merged == MergedVMCS() && guest.test.journal.holdings.isEmpty)
    }

    @Test func `without its virtual APIC the shadow goes where every access to CR8 exits anyway; else the entry fails`()
        throws
    {
        let guest = try TestGuest.hypervisor()
        let nested = NestedVMX(guest.cpus[0])
        for (apic, exits) in [(nil, true), (nil, false), (0, true), (0, false)] as [(Int?, Bool)] {
            var vmcs = controls(apic: apic, virtual: nowhere)
            vmcs.exitsOnCR8 = exits
            _ = guest.inSlots { nested.enter(vmcs, ownBitmap: nothing) }
            let drops = apic == nil && exits
            #expect(nested.merged.usesTPRShadow == !drops && nested.merged.virtualAPICPoisoned == !drops)
            #expect(nested.merged.virtualAPICPage == nil)
            guest.inSlots { nested.exitToHypervisor() }
        }
    }

    @Test func `without a descriptor no interrupt is posted; without a bitmap every MSR exits`() throws {
        let guest = try TestGuest.hypervisor()
        let nested = NestedVMX(guest.cpus[0])
        let vmcs = controls(posted: nowhere, bitmap: nowhere)
        #expect(guest.inSlots { nested.enter(vmcs, ownBitmap: nothing) } == .entered)
        #expect(nested.merged.postedInterruptDescriptor == nil && nested.descriptor(of: vmcs) == nil)
        #expect(!nested.merged.usesMSRBitmap)
        guest.inSlots { nested.free() }
    }

    @Test func `the merged bitmap exits where either wants to; the descriptor is at its place in the page`() throws {
        let guest = try TestGuest.hypervisor()
        try guest.space.store(at(3) + 8, 0xf0)
        try guest.space.store(at(2) + 64, 0x1234)
        let nested = NestedVMX(guest.cpus[0])
        var own = nothing
        own[1] = 0x0f
        own[511] = 1
        _ = guest.inSlots { nested.enter(controls(), ownBitmap: own) }
        #expect(nested.mergedMSRBitmap[0] == 3 && nested.mergedMSRBitmap[1] == 0xff && nested.mergedMSRBitmap[511] == 1)
        #expect(nested.descriptor(of: controls())?.load(as: UInt64.self) == 0x1234)
        guest.inSlots { nested.free() }
    }
}

/// x86 6.3: the enlightened VMCS is valid as long as its page is mapped, and mapped as long as it is valid.
@Suite struct X6_3_EnlightenedVMCS {
    private func guest() throws -> (TestGuest, EnlightenedVMCS) {
        let guest = try TestGuest.hypervisor()
        for page in 0..<2 { try guest.space.store(at(page), UInt64(EnlightenedVMCS.version)) }
        try guest.space.store(at(2), UInt64(EnlightenedVMCS.ownRevision))
        return (guest, EnlightenedVMCS(guest.cpus[0]))
    }

    @Test func `another pointer gives back the last page, the same one keeps it`() throws {
        let (guest, vmcs) = try guest()
        func load(_ page: Int?, launches: Bool = false) -> EnlightenedLoad {
            guest.inSlots { vmcs.load(page.map { gfn($0).address }, isEnabled: true, launches: launches) }
        }
        #expect(load(0) == .succeeded && vmcs.frame == guest.frame(0) && vmcs.mustMergeBitmap)
        vmcs.used(clean: 7)
        #expect(load(0) == .succeeded && vmcs.cleanFields == 7 && !vmcs.mustMergeBitmap)
        #expect(load(0, launches: true) == .succeeded && vmcs.cleanFields == 0 && vmcs.mustMergeBitmap)
        #expect(load(2) == .succeeded && (0..<3).map(guest.pins) == [0, 0, 1], "KVM's own revision will do")
        #expect(try guest.dirty() == [0])
        #expect(load(nil) == .disabled && vmcs.pointer == .invalid && !vmcs.isMapped)
        #expect(guest.test.journal.holdings.isEmpty)
        guest.inSlots { vmcs.release() }
    }

    @Test func `a page that can't be mapped, a revision that nobody has, a feature that is off`() throws {
        let (guest, vmcs) = try guest()
        func load(_ page: Int, enabled: Bool = true) -> EnlightenedLoad {
            guest.inSlots { vmcs.load(gfn(page).address, isEnabled: enabled, launches: true) }
        }
        #expect(load(0) == .succeeded)
        #expect(load(nowhere) == .error && vmcs.pointer == .invalid && guest.test.journal.holdings.isEmpty)
        #expect(load(3) == .failed && vmcs.pointer == .invalid && guest.test.journal.holdings.isEmpty)
        #expect(load(0, enabled: false) == .disabled)
    }

    @Test func `after a migration the page is mapped by the next load`() throws {
        let (guest, vmcs) = try guest()
        _ = guest.inSlots { vmcs.load(gfn(0).address, isEnabled: true, launches: false) }
        guest.inSlots { vmcs.migrated() }
        #expect(vmcs.pointer == .mapPending && !vmcs.isMapped && guest.test.journal.holdings.isEmpty)
        #expect(guest.inSlots { vmcs.load(gfn(0).address, isEnabled: true, launches: false) } == .succeeded)
        guest.inSlots { vmcs.release() }
    }
}

/// x86 6.2, SVM: maps of a moment, and one that stays.
@Suite struct X6_2_NestedSVM {
    @Test func `a control block is mapped for the instruction alone, and dirtied by it`() throws {
        let guest = try TestGuest.hypervisor()
        let nested = NestedSVM(guest.cpus[0])
        var during = 0
        #expect(
            guest.inSlots {
                nested.withControlBlock(gfn(0).address) { bytes in
                    during = guest.pins(0)
                    bytes.storeBytes(of: 9, as: UInt64.self)
                }
            } == .done)
        #expect(try during == 1 && guest.test.journal.holdings.isEmpty && guest.space.load(at(0)) == 9)
        #expect(guest.inSlots { nested.withOperand(gfn(1).address) { _ in } } == .done)
        #expect(try guest.dirty() == [0, 1], "VMLOAD's operand too")
        #expect(guest.inSlots { nested.withOperand(gfn(nowhere).address) { _ in } } == .generalProtection)
    }

    @Test func `system management mode: entry and return, and what it means if they fail`() throws {
        let guest = try TestGuest.hypervisor()
        let nested = NestedSVM(guest.cpus[0])
        guest.inSlots {
            #expect(nested.enterManagementMode(saveArea: gfn(0).address) { _ in } == .done)
            #expect(nested.enterManagementMode(saveArea: gfn(nowhere).address) { _ in } == .dead)
            var pins: [Int] = []
            #expect(
                nested.leaveManagementMode(controlBlock: gfn(1).address, saveArea: gfn(2).address) { _, _ in
                    pins = (0..<3).map(guest.pins)
                } == .done)
            #expect(pins == [0, 1, 1])
            let pairs = [(nowhere, 2), (1, nowhere)]
            for (block, area) in pairs {
                #expect(
                    nested.leaveManagementMode(controlBlock: gfn(block).address, saveArea: gfn(area).address) { _, _ in
                    }
                        == .shutdown)
            }
        }
        #expect(guest.test.journal.holdings.isEmpty)
    }

    @Test func `the communication block stays mapped until the next entry`() throws {
        let guest = try TestGuest.hypervisor()
        let nested = NestedSVM(guest.cpus[0])
        #expect(guest.inSlots { nested.mapCommunication(gfn(0).address) })
        #expect(nested.communicationFrame == guest.frame(0) && guest.pins(0) == 1)
        guest.inSlots { nested.unmapCommunication() }
        #expect(try guest.test.journal.holdings.isEmpty && guest.dirty() == [0])
        #expect(!guest.inSlots { nested.mapCommunication(gfn(nowhere).address) })
        guest.inSlots { nested.unmapCommunication() }
    }
}
