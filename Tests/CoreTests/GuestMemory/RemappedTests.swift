import Audit
import Frames
import Machine
import Testing

@testable import GuestMemory
@testable import HostMemory

/// `hva_to_pfn_remapped`, its rows, over every kind of memory that is mapped by frame number.
@Suite struct G2_6_Remapped {
    /// A kind of PFN map, its frame at page 1 of 2, and who must stay alive.
    struct Kind: CustomTestStringConvertible, Sendable {
        let testDescription: String
        let make: @Sendable (Host) throws -> (DriverMapping, HostFrame)
    }

    static let kinds: [Kind] = [
        Kind(testDescription: "device memory, filled at mmap") {
            let bar = try #require(DeviceBAR($0, pages: 2, filling: .atMap))
            return (bar, bar.frames.lowerBound.advanced(by: 1))
        },
        Kind(testDescription: "device memory, filled by fault") {
            let bar = try #require(DeviceBAR($0, pages: 2, filling: .byFault))
            return (bar, bar.frames.lowerBound.advanced(by: 1))
        },
        Kind(testDescription: "reserved RAM") {
            let reserved = try #require(ReservedMemory($0, pages: 2))
            return (reserved, reserved.frames.lowerBound.advanced(by: 1))
        },
        Kind(testDescription: "counted pages") {
            let counted = try #require(CountedPagesByFrame($0, pages: 2))
            return (counted, counted.frames[1])
        },
        Kind(testDescription: "tail page of a graphics buffer, count 0") {
            let buffer = try #require(GraphicsBuffer($0, pages: 2, order: 1))
            return (buffer, try #require(buffer.frame(of: 1)))
        },
        Kind(testDescription: "graphics buffer in device memory") {
            let buffer = try #require(GraphicsBuffer($0, pages: 2, order: 0))
            try buffer.move(to: .deviceMemory)
            return (buffer, try #require(buffer.frame(of: 1)))
        },
    ]

    @Test(arguments: kinds)
    func `I-5, I-15: no reference, no mark, and no failure because of a count`(kind: Kind) throws {
        let guest = TestGuest()
        let (driver, frame) = try kind.make(guest.test.host)
        try guest.space.mapPages(0, 2, .driver(driver))
        try guest.setSlot(pages: 2)
        let before = guest.test.memory.inspect(frame)
        for write in [false, true] {
            #expect(guest.faultIn(1, write: write) == .mapped(frame, writable: true))
        }
        #expect(guest.store(1, 4) == .stored)
        #expect(guest.load(1) == .value(4))
        #expect(guest.leaf(1)?.frame == frame)
        #expect(guest.test.memory.inspect(frame) == before)
        #expect(guest.test.events(.referenceTaken).isEmpty && guest.test.events(.pinTaken).isEmpty)
        guest.check()
    }

    @Test(arguments: kinds)
    func `a mapping that may not be written is FAULT while absent and RO_FAULT when present`(kind: Kind) throws {
        let guest = TestGuest()
        let (driver, frame) = try kind.make(guest.test.host)
        try guest.space.mapPages(0, 2, .driver(driver), .read)
        try guest.setSlot(pages: 2)
        if guest.frame(1) == nil { #expect(guest.faultIn(1, write: true) == .failed(.fault)) }
        #expect(guest.faultIn(1) == .mapped(frame, writable: false))
        #expect(guest.faultIn(1, write: true) == .failed(.readOnly))
        #expect(guest.load(1) != .mmio && guest.leaf(1)?.writable == false)
        guest.check()
    }

    @Test func `a huge entry gives the exact frame`() throws {
        let guest = TestGuest(deviceFrames: 1024)
        let bar = try #require(DeviceBAR(guest.test.host, pages: 512, filling: .byHugeFault))
        try guest.space.mapPages(0, 512, .driver(bar))
        try guest.setSlot(pages: 512)
        #expect(guest.faultIn(77) == .mapped(bar.frames.lowerBound.advanced(by: 77), writable: true))
        #expect(guest.space.translate(at(77))?.level == .page2M)
    }

    @Test func `row 3b: a fault that fails is FAULT`() throws {
        let guest = TestGuest()
        let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .byFault))
        try guest.space.mapPages(0, 1, .driver(bar))
        try guest.setSlot(pages: 1)
        bar.disable()
        for noWait in [false, true] { #expect(guest.faultIn(0, noWait: noWait) == .failed(.fault)) }
        bar.enable()
        #expect(guest.faultIn(0) == .mapped(bar.frames.lowerBound, writable: true))
    }

    @Test func `row 3b: a fatal signal during the fault is FAULT, not a signal`() throws {
        let guest = TestGuest()
        let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .byFault))
        let killer = ActingDriver(bar) { guest.space.signals.fatal = true }
        try guest.space.mapPages(0, 1, .driver(killer))
        try guest.setSlot(pages: 1)
        #expect(guest.faultIn(0) == .failed(.fault))
    }

    @Test func `row 3: when the lock was dropped, everything is looked up again`() throws {
        let guest = TestGuest()
        let bar = try #require(DeviceBAR(guest.test.host, pages: 2, filling: .byFault))
        let other = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .atMap))
        let space = guest.space
        let gone = ActingDriver(bar) { #expect(throws: Never.self) { try space.unmap(pages(0..<1)) } }
        let swapped = ActingDriver(bar) {
            #expect(throws: Never.self) {
                try space.unmap(pages(1..<2))
                try space.mapPages(1, 1, .driver(other))
            }
        }
        let anonymous = ActingDriver(bar) {
            #expect(throws: Never.self) {
                try space.unmap(pages(2..<3))
                try space.mapPages(2, 1)
            }
        }
        for (page, driver) in [gone, swapped, anonymous].enumerated() {
            try space.mapPages(page, 1, .driver(driver))
        }
        try guest.setSlot(pages: 3)
        #expect(guest.faultIn(0) == .failed(.fault), "nothing is mapped there any more")
        #expect(guest.faultIn(1) == .mapped(other.frames.lowerBound, writable: true), "another device is")
        #expect(guest.faultIn(2) == .failed(.fault), "ordinary memory by now: the walk has no more to say")
        #expect(guest.faultIn(2).references == 1, "and the next fault finds it")
        #expect([gone, swapped, anonymous].allSatisfy { $0.waits == 1 })
    }

    @Test func `row 3: a fault that succeeds at the second attempt`() throws {
        let guest = TestGuest()
        let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .byFault))
        let driver = ActingDriver(bar) {}
        try guest.space.mapPages(0, 1, .driver(driver))
        try guest.setSlot(pages: 1)
        #expect(guest.faultIn(0, write: true) == .mapped(bar.frames.lowerBound, writable: true))
    }

    @Test func `what was copied on write in a private PFN map is an ordinary page to the fast lookup only`() throws {
        let guest = TestGuest()
        let counted = try #require(CountedPagesByFrame(guest.test.host, pages: 1))
        try guest.space.mapPages(0, 1, .driver(counted, shared: false))
        try guest.setSlot(pages: 1)
        #expect(guest.faultIn(0) == .mapped(counted.frames[0], writable: false))
        #expect(guest.faultIn(0, write: true) == .failed(.readOnly))
        try guest.space.store(at(0), 1)
        let copy = guest.frame(0)
        #expect(copy != counted.frames[0])
        #expect(guest.faultIn(0, write: true) == .page(copy, writable: true), "it looks at no VMA")
        #expect(guest.follow(0) == .mapped(copy, writable: false), "the slow one does, and leaves it to the walk")
    }

    @Test func `a mapping that allows nothing is FAULT`() throws {
        let guest = TestGuest()
        let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .atMap))
        try guest.space.mapPages(0, 1, .driver(bar))
        try guest.setSlot(pages: 1)
        try guest.space.protect(pages(0..<1), .none)
        for write in [false, true] { #expect(guest.faultIn(0, write: write) == .failed(.fault)) }
    }
}

/// Asks for one retry at its first fault, acts while no lock is held, and then does what `other` does.
private final class ActingDriver: DriverMapping, @unchecked Sendable {
    // Unchecked: tests call from one task at a time.
    let other: DriverMapping
    let action: () -> Void
    var waits = 0
    init(_ other: DriverMapping, _ action: @escaping () -> Void) {
        self.other = other
        self.action = action
        super.init(name: "acting", flags: other.flags)
        for frames in other.claimedFrames { claim(frames) }
    }
    override func fault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault { waits == 0 ? .retry : other.fault(space, vma, address, write: write) }
    override func waitForRetry() {
        waits += 1
        action()
    }
}
