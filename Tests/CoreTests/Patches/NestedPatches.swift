import Audit
import Frames
import HostMemory
import Synchrony
import Testing

@testable import GuestMemory
@testable import Paging

// What KVM maps for a guest hypervisor's own guest.

extension TestGuest {
    /// Four pages in a logged slot, of which the log is empty; 0 APIC access, 1 virtual APIC, 2 descriptor, 3 MSR bitmap.
    fileprivate static func withHypervisor() throws -> TestGuest {
        let guest = TestGuest()
        try guest.addMemory(0, 4, log: true)
        for page in 0..<4 { try guest.space.store(at(page), 0x77) }
        _ = try guest.vm.getDirtyLog(slot: 0)
        return guest
    }
    fileprivate var loggedPages: [Int] {
        get throws { try vm.getDirtyLog(slot: 0).pages.filter { $0 < 4 } }
    }
    fileprivate var pins: Int { test.journal.holdings.reduce(0) { $0 + $1.pins } }
}

private func allPages() -> NestedVMCS {
    var vmcs = NestedVMCS()
    vmcs.apicAccessPage = gfn(0).address
    vmcs.virtualAPICPage = gfn(1).address
    vmcs.postedInterruptDescriptor = gfn(2).address
    vmcs.msrBitmap = gfn(3).address
    return vmcs
}
private let nothing = [UInt64](repeating: 0, count: 512)

@Suite struct Patch23_TheMapTellsWhetherItIs {
    @Test func `a page that was looked at and found to be none of ours is not left mapped`() throws {
        try checkPatch(23) {
            let guest = try TestGuest.withHypervisor()
            let vmcs = EnlightenedVMCS(guest.cpus[0])
            guest.vm.withSlots {
                #expect(
                    vmcs.load(gfn(0).address, isEnabled: true, launches: true) == .failed, "the revision is nobody's")
            }
            #expect(guest.pins == 0 && !vmcs.isMapped)
        }
    }

    @Test func `to release what never was mapped does nothing, any number of times`() throws {
        let guest = try TestGuest.withHypervisor()
        let vmcs = EnlightenedVMCS(guest.cpus[0])
        guest.vm.withSlots { for _ in 0..<3 { vmcs.release() } }
        #expect(try guest.loggedPages == [] && guest.test.events(.pinDropped).isEmpty)
    }
}

/// The map moved from the nested state to the function that uses it; a bitmap that stays mapped can't be spelled now.
@Suite struct Patch24_TheBitmapIsMappedForAMoment {
    @Test func `when the entry is over the bitmap is merged and not mapped, and was only read`() throws {
        let guest = try TestGuest.withHypervisor()
        let nested = NestedVMX(guest.cpus[0])
        var vmcs = NestedVMCS()
        vmcs.msrBitmap = gfn(3).address
        guest.vm.withSlots { #expect(nested.enter(vmcs, ownBitmap: nothing) == .entered) }
        #expect(nested.merged.usesMSRBitmap && nested.mergedMSRBitmap[0] == 0x77)
        #expect(guest.pins == 0)
        #expect(guest.test.events(.pinTaken).count == 1 && guest.test.events(.pinDropped).count == 1)
        guest.vm.withSlots { nested.exitToHypervisor() }
        #expect(try guest.loggedPages == [])
    }
}

/// Two callers unmapped the pages one by one; now one function does it for both.
@Suite struct Patch25_AllPagesTogether {
    enum End: CaseIterable, Sendable { case exit, free, failedEntry }

    @Test(arguments: End.allCases) func `whichever way a nested guest ends, nothing stays pinned`(end: End) throws {
        let guest = try TestGuest.withHypervisor()
        let nested = NestedVMX(guest.cpus[0])
        var vmcs = allPages()
        if end == .failedEntry { vmcs.apicAccessPage = gfn(100).address }
        guest.vm.withSlots {
            let entry = nested.enter(vmcs, ownBitmap: nothing)
            #expect(entry == (end == .failedEntry ? .internalError : .entered))
            if end != .failedEntry { #expect(guest.pins == 3) }
            switch end {
            case .exit: nested.exitToHypervisor()
            case .free: nested.free()
            case .failedEntry: break
            }
        }
        #expect(guest.pins == 0 && nested.merged == MergedVMCS())
        #expect(nested.descriptor(of: vmcs) == nil)
    }
}

@Suite struct Patch32_TheAPICAccessPageIsDirtied {
    @Test func `when the nested guest is left, its APIC access page is in the log and dirty, like the others`() throws {
        try checkPatch(32) {
            let guest = try TestGuest.withHypervisor()
            guest.test.memory.forgetAccessedAndDirty()
            let nested = NestedVMX(guest.cpus[0])
            guest.vm.withSlots {
                #expect(nested.enter(allPages(), ownBitmap: nothing) == .entered)
                nested.exitToHypervisor()
            }
            #expect(try guest.loggedPages == [0, 1, 2])
            #expect(guest.test.state(try #require(guest.frame(0))).flags.isDirty(by: .kvm))
        }
    }
}
