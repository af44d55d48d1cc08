import Audit
import Foundation
import Frames
import Machine
import Synchrony
import Testing

@testable import GuestMemory
@testable import HostMemory

/// How each change of a slot goes.
@Suite struct G4_5_Changes {
    @Test func `create and flags are one generation, delete and move two`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 8)
        #expect(guest.vm.slotsGeneration == 0)
        try guest.setSlot(0, pages: 4)
        #expect(guest.vm.slotsGeneration == 1)
        try guest.setSlot(0, pages: 4, log: true)
        #expect(guest.vm.slotsGeneration == 2)
        try guest.setSlot(0, guest: 32, pages: 4, host: 0, log: true)
        #expect(guest.vm.slotsGeneration == 4)
        try guest.deleteSlot()
        #expect(guest.vm.slotsGeneration == 6)
    }

    /// What others see while the MMU removes a slot's entries.
    private final class Watching {
        var calls = 0
        var seen: [MemorySlot] = []
    }

    private func flushing(_ guest: TestGuest, _ change: () throws -> Void) throws -> Watching {
        let watching = Watching()
        let interposer = Interposer(0) {
            watching.calls += 1
            watching.seen = guest.vm.activeSlots
        }
        // Slots change with slots_lock held, so the points count with it held.
        interposer.ignoring(LockRank.slots)
        interposer.mayFire = { guest.vm.activeSlots.contains { $0.isInvalid } }
        try interposer.run(change)
        return watching
    }

    @Test(arguments: Architecture.twoStage, [true, false])
    func `delete and move show an INVALID slot while the entries go, and I-21: none is left`(
        architecture: Architecture, deletes: Bool
    ) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 4)
        for page in 0..<4 { guest.store(page, UInt64(page) + 1) }
        #expect(guest.leafCount == 4)
        let watching = try flushing(guest) {
            if deletes { try guest.deleteSlot() } else { try guest.setSlot(guest: 64, pages: 4, host: 0) }
        }
        #expect(watching.calls == 1 && watching.seen.count == 1 && watching.seen.allSatisfy { $0.isInvalid })
        #expect(guest.leafCount == 0)
        guest.check()
        if deletes {
            #expect(guest.vm.activeSlots.isEmpty && guest.load(0) == .mmio)
        } else {
            #expect(guest.load(0) == .mmio && guest.load(64) == .value(1))
            #expect(guest.vm.activeSlots.map(\.frames) == [gfn(64)..<gfn(68)])
        }
        #expect(try guest.space.load(at(2)) == 3, "the process's memory is not touched")
    }

    @Test(arguments: Architecture.twoStage)
    func `the generation says "in progress" until every reader of the old set has left`(
        architecture: Architecture
    ) throws {
        let progress: UInt64 = 1 << 63
        var seen: [UInt64] = []
        for point in 0... {
            let guest = TestGuest(architecture)
            try guest.addMemory(0, 1)
            guest.store(0, 1)
            let interposer = Interposer(point) {
                seen.append(guest.vm.slotsGeneration)
            }
            interposer.ignoring(LockRank.slots)
            interposer.mayFire = { guest.vm.activeSlots.contains { $0.isInvalid } }
            try interposer.run { try guest.deleteSlot() }
            #expect(guest.vm.slotsGeneration == 3)
            if !interposer.hasFired { break }
        }
        let first = seen.prefix { $0 == 1 | progress }
        #expect(!first.isEmpty && first.count < seen.count)
        #expect(seen.dropFirst(first.count).allSatisfy { $0 == 2 })
    }

    @Test(arguments: Architecture.twoStage)
    func `X16: entries are removed only after every handler that knows the old slot is done`(
        architecture: Architecture
    ) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 1)
        guest.store(0, 1)
        let done = Flag()
        let side = guest.vm.slotReaders.enter()
        let thread = Thread {
            #expect(throws: Never.self) { try guest.deleteSlot() }
            done.raise()
        }
        thread.start()
        while !done.isRaised && !guest.vm.activeSlots.contains(where: { $0.isInvalid }) {
            Thread.sleep(forTimeInterval: 0.001)
        }
        Thread.sleep(forTimeInterval: 0.02)
        #expect(!done.isRaised && guest.leafCount == 1)
        guest.vm.slotReaders.exit(side)
        while !done.isRaised { Thread.sleep(forTimeInterval: 0.001) }
        #expect(guest.leafCount == 0)
    }

    @Test(arguments: Architecture.twoStage)
    func `a slot that is being deleted gives no frame, and the guest on x86 waits for the end`(
        architecture: Architecture
    ) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 1)
        guest.store(0, 1)
        var outcome: GuestMemory.FaultOutcome?
        let interposer = Interposer(0) {
            let fault = GuestFault(address: gfn(0).address, access: .read, entryPresent: false)
            let cpu = guest.cpus[0]
            if cpu.root == nil { guest.vm.mmu.loadRoot(cpu) }
            outcome = guest.vm.withSlots { guest.vm.mmu.handleFault(cpu, fault) }
        }
        interposer.ignoring(LockRank.slots)
        interposer.mayFire = { guest.vm.activeSlots.contains { $0.isInvalid } }
        try interposer.run { try guest.deleteSlot() }
        #expect(outcome == (ArchitectureSet.x86.contains(architecture) ? .retry : .emulate))
        #expect(guest.test.events(.entryInstalled).count == 1, "nothing was installed through the dying slot")
    }

    @Test(arguments: Architecture.twoStage)
    func `a move that is refused brings the old slot back, empty`(architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 4)
        guest.store(0, 5)
        var region = guest.region(0, pages: 4)
        region.guestAddress = GuestAddress(1 << UInt64(guest.vm.mmu.guestAddressBits))
        #expect(throws: ArchitectureSet.x86.contains(architecture) ? Errno.EINVAL : .EFAULT) {
            try guest.vm.setMemoryRegion(region)
        }
        #expect(guest.vm.activeSlots.map(\.frames) == [gfn(0)..<gfn(4)])
        #expect(guest.vm.activeSlots.allSatisfy { !$0.isInvalid } && guest.vm.slotSetsAgree())
        #expect(guest.vm.slotsGeneration == 3, "its entries are gone, so what was cached must be, too")
        #expect(guest.leafCount == 0 && guest.load(0) == .value(5))
        guest.check()
    }

    @Test(arguments: Architecture.twoStage)
    func `a change of flags keeps the entries, their write access follows the log`(architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 2)
        for page in 0..<2 { guest.store(page, 1) }
        try guest.setSlot(pages: 2, log: true)
        #expect(guest.leafCount == 2 && guest.leaf(0)?.writable == false)
        guest.check()
        guest.store(0, 2)
        try guest.setSlot(pages: 2)
        #expect(guest.leafCount == 2)
        #expect(guest.vm.activeSlots[0].dirtyBitmap == nil)
        guest.check()
    }

    @Test func `a move keeps what was logged`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 4, log: true)
        guest.store(2, 1)
        try guest.setSlot(guest: 64, pages: 4, host: 0, log: true)
        #expect(try guest.vm.getDirtyLog(slot: 0).pages == [2])
    }

    @Test func `two slots may show the same memory, and lose their entries together`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 2)
        try guest.setSlot(0, guest: 0, pages: 2, host: 0)
        try guest.setSlot(1, guest: 100, pages: 2, host: 0)
        #expect(guest.store(0, 5) == .stored && guest.load(100) == .value(5))
        #expect(guest.leaf(0)?.frame == guest.leaf(100)?.frame)
        try guest.space.advise(pages(0..<1), .dontNeed)
        #expect(guest.leafCount == 0)
        guest.check()
    }

    @Test(arguments: Architecture.twoStage)
    func `deleting one slot leaves the others' memory as it is`(architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        try guest.space.mapPages(0, 8)
        try guest.setSlot(0, guest: 0, pages: 4)
        try guest.setSlot(1, guest: 4, pages: 4)
        for page in 0..<8 { guest.store(page, UInt64(page)) }
        try guest.deleteSlot(0)
        guest.check()
        for page in 4..<8 { #expect(guest.load(page) == .value(UInt64(page))) }
    }
}
