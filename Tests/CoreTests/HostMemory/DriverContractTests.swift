import Audit
import Frames
import Synchrony
import Testing

@testable import HostMemory

/// A driver of four pages whose every answer a test can spoil.
private final class BrokenDriver: DriverMapping, @unchecked Sendable {
    // Unchecked: tests call from one task.
    let kept: DriverPages
    var onFault: (AddressSpace, VMAInfo, UserAddress) -> DriverFault = { _, _, _ in .busError }
    var onHugeFault: ((AddressSpace, VMAInfo, UserAddress) -> DriverFault)?
    var onMakeWritable: (AddressSpace, UserAddress) -> DriverFault = { _, _ in .inserted }
    var faults = 0

    init(_ host: Host, flags: VMAFlags = .frames, notified: Bool = false) {
        kept = DriverPages(host, count: 4)!
        super.init(name: "broken", flags: flags, wantsWriteNotification: notified)
        claim(kept)
        onFault = { [unowned self] in insert(0, $0, $1, $2) }
    }
    /// Page `shift` pages from where it should be.
    func insert(_ shift: Int, _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress) -> DriverFault {
        space.insertFrame(kept.frames[(vma.backingPage(of: address) + shift) % 4], at: address, in: vma)
    }
    override func fault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault {
        faults += 1
        return onFault(space, vma, address)
    }
    override func hugeFault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault? { onHugeFault?(space, vma, address) }
    override func makeWritable(_ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress) -> DriverFault {
        onMakeWritable(space, address)
    }
}

@Suite struct D1_DriverContract {
    let test = TestHost(ramFrames: 2048, deviceFrames: 1024)

    /// The findings are `expected`, each naming the driver; nothing else was found, and all memory comes back.
    private func expect(
        _ expected: [StaticReason], frame: HostFrame? = nil, _ driver: StaticReason = "broken",
        sourceLocation: SourceLocation = #_sourceLocation
    ) {
        let found = test.journal.findings
        #expect(found.map(\.reason) == expected, sourceLocation: sourceLocation)
        #expect(found.allSatisfy { $0.invariant == .d1 && $0.driver == driver }, sourceLocation: sourceLocation)
        if let frame { #expect(found.first?.frame == frame.number, sourceLocation: sourceLocation) }
        #expect(test.journal.holdings.isEmpty, sourceLocation: sourceLocation)
    }

    /// Runs with a space that maps a broken driver's four pages at test page 0.
    private func run(
        _ driver: BrokenDriver, shared: Bool = true, _ body: (AddressSpace) throws -> Void
    ) throws {
        let space = test.space()
        try space.mapPages(0, 4, .driver(driver, shared: shared))
        try body(space)
        space.exit()
    }

    @Test func `a driver that keeps it is not found`() throws {
        let driver = BrokenDriver(test.host)
        try run(driver) { space in
            for page in 0..<4 { try space.store(at(page), 1) }
            driver.unmapMappings(pages: 0..<4)
            driver.kept.free(from: driver)
        }
        expect([])
    }

    @Test func `a foreign frame is refused: another driver's, RAM, device memory, none at all`() throws {
        let other = try #require(CountedPagesByFrame(test.host, pages: 1))
        let outside = [
            other.frames[0], HostFrame(0), test.memory.device.lowerBound, test.memory.device.upperBound,
            HostFrame(1 << 40),
        ]
        let driver = BrokenDriver(test.host)
        try run(driver) { space in
            for frame in outside {
                driver.onFault = { space, vma, address in space.insertFrame(frame, at: address, in: vma) }
                #expect(throws: UserFault.bus) { try space.access(at(1), store: nil) }
            }
            driver.onFault = { [unowned driver] in driver.insert(0, $0, $1, $2) }
            try space.store(at(1), 1)
        }
        expect(Array(repeating: "maps a frame that is not its own", count: 5), frame: other.frames[0])
    }

    @Test func `a frame past its own buffer is refused`() throws {
        let driver = BrokenDriver(test.host)
        let past = driver.claimedFrames.last!.upperBound
        driver.onFault = { space, vma, address in space.insertFrame(past, at: address, in: vma) }
        try run(driver) { space in #expect(throws: Errno.EFAULT) { try space.load(at(3)) } }
        expect(["maps a frame that is not its own"], frame: past)
    }

    @Test func `a frame that is free, or a page table, is refused though it was claimed`() throws {
        let driver = BrokenDriver(test.host)
        let free = try #require(test.memory.allocatePages(order: 0))
        test.memory.put(test.memory.page(free))
        let table = try #require(test.host.allocateTable(order: 0, fill: 0))
        try run(driver) { space in
            // Makes the tables, so that none takes the free frame.
            try space.store(at(0), 1)
            for frame in [free, table] {
                guard test.state(frame).flags.isFree || frame == table else { continue }
                driver.claim(frame..<frame.advanced(by: 1))
                driver.onFault = { space, vma, address in space.insertFrame(frame, at: address, in: vma) }
                #expect(throws: Errno.EFAULT) { try space.load(at(1)) }
            }
        }
        test.host.freeTable(table)
        let count = test.journal.findings.count
        #expect(count >= 1)
        expect(Array(repeating: "maps a frame that is free or a page table", count: count))
    }

    @Test func `a counted page that is not its own is refused`() throws {
        let other = try #require(DriverPages(test.host, count: 1))
        let driver = BrokenDriver(test.host, flags: .mixed)
        driver.onFault = { space, vma, address in space.insertPage(other.frames[0], at: address, in: vma) }
        try run(driver) { space in #expect(throws: Errno.EFAULT) { try space.load(at(1)) } }
        expect(["maps a frame that is not its own"], frame: other.frames[0])
        #expect(test.state(other.frames[0]).referenceCount == 1)
    }

    @Test func `counted pages in a PFN map, special entries among counted pages, device memory by reference`() throws {
        let frames = BrokenDriver(test.host)
        frames.onFault = { [unowned frames] space, vma, address in
            space.insertPage(frames.kept.frames[0], at: address, in: vma)
        }
        try run(frames) { space in #expect(throws: Errno.EFAULT) { try space.load(at(0)) } }
        let counted = BrokenDriver(test.host, flags: VMAFlags())
        try run(counted) { space in #expect(throws: Errno.EFAULT) { try space.load(at(0)) } }
        let mixed = BrokenDriver(test.host, flags: .mixed)
        let device = try #require(test.memory.allocateDeviceFrames(1))
        mixed.claim(device)
        mixed.onFault = { space, vma, address in space.insertPage(device.lowerBound, at: address, in: vma) }
        try run(mixed) { space in #expect(throws: Errno.EFAULT) { try space.load(at(0)) } }
        expect([
            "maps a page by reference where none is counted", "makes a special entry in a mapping of counted pages",
            "maps a page by reference where none is counted",
        ])
    }

    @Test(arguments: [4, -1, 100_000])
    func `an entry outside of the mapping is refused`(page: Int) throws {
        let place = UserAddress(at(8).value &+ UInt64(bitPattern: Int64(page - 8)) &* pageSize)
        let driver = BrokenDriver(test.host)
        driver.onFault = { [unowned driver] space, vma, _ in
            space.insertFrame(driver.kept.frames[0], at: place, in: vma)
        }
        try run(driver) { space in
            #expect(throws: Errno.EFAULT) { try space.load(at(0)) }
            #expect(space.translate(place) == nil)
        }
        expect(["inserts outside of the mapping that it was asked for"], frame: driver.kept.frames[0])
    }

    @Test func `a huge entry that is misaligned, too long, of no level, or in a private mapping is refused`() throws {
        let device = try #require(test.memory.allocateDeviceFrames(1024, alignment: .page2M)).lowerBound
        let driver = BrokenDriver(test.host)
        driver.claim(device..<device.advanced(by: 1024))
        let space = test.space()
        try space.mapPages(0, 1024, .driver(driver))
        let cases: [(Int, Int, PageLevel)] = [(1, 0, .page2M), (0, 1, .page2M), (0, 0, .page1G), (1023, 0, .page2M)]
        for (page, frame, level) in cases {
            driver.onHugeFault = { space, vma, _ in
                space.insertFrame(device.advanced(by: frame), at: at(page), in: vma, level: level)
            }
            #expect(throws: Errno.EFAULT) { try space.load(at(0)) }
        }
        driver.onHugeFault = { space, vma, address in
            space.insertFrame(device, at: address.aligned(to: .page2M), in: vma, level: .page2M)
        }
        try space.mapPages(2048, 512, .driver(driver, shared: false))
        #expect(throws: Errno.EFAULT) { try space.load(at(2048)) }
        space.exit()
        let found = test.journal.findings
        #expect(found.count == 5 && found.allSatisfy { $0.invariant == .d1 && $0.driver == "broken" })
        #expect(found.filter { $0.reason == "inserts a huge entry where none fits" }.count >= 3)
    }

    @Test func `an answer without an entry ends as SIGBUS, after a while`() throws {
        let driver = BrokenDriver(test.host)
        driver.onFault = { _, _, _ in .inserted }
        try run(driver) { space in
            #expect(throws: UserFault.bus) { try space.access(at(0), store: 1) }
            #expect(driver.faults == DriverMapping.toleratedEmptyAnswers)
            // KVM asks once and then finds nothing.
            #expect(space.fixup(at(0), write: false).error == nil && space.walk(at(0)) == nil)
            driver.onFault = { [unowned driver] in driver.insert(0, $0, $1, $2) }
            try space.store(at(0), 2)
        }
        expect(["says that it has inserted an entry, and there is none"])
    }

    @Test func `one empty answer may be a zap that came between`() throws {
        let driver = BrokenDriver(test.host)
        var isFirst = true
        driver.onFault = { [unowned driver] space, vma, address in
            let answer = driver.insert(0, space, vma, address)
            if isFirst { driver.unmapMappings(pages: 0..<4) }
            isFirst = false
            return answer
        }
        try run(driver) { space in try space.store(at(0), 1) }
        #expect(driver.faults == 2)
        expect([])
    }

    @Test func `a huge fault's empty answer ends as well`() throws {
        let driver = BrokenDriver(test.host)
        driver.onHugeFault = { _, _, _ in .inserted }
        let space = test.space()
        try space.mapPages(0, 512, .driver(driver))
        #expect(throws: Errno.EFAULT) { try space.load(at(0)) }
        space.exit()
        expect(["says that it has inserted an entry, and there is none"])
    }

    @Test func `a write to a frame that it gave up is refused`() throws {
        let driver = BrokenDriver(test.host, notified: true)
        try run(driver) { space in
            #expect(try space.load(at(0)) == 0)
            // As if it had never been its own; nobody hears of it.
            let frame = driver.kept.frames[0]
            #expect(driver.owned.remove(frame..<frame.advanced(by: 1)))
            #expect(throws: UserFault.bus) { try space.access(at(0), store: 1) }
            driver.claim(driver.kept)
            try space.store(at(0), 1)
        }
        expect(["lets a process write a frame that is not its own"], frame: driver.kept.frames[0])
    }

    @Test func `saying that an entry was widened is not enough`() throws {
        let driver = BrokenDriver(test.host, notified: true)
        driver.onMakeWritable = { _, _ in .handled }
        try run(driver) { space throws in
            #expect(throws: Errno.EFAULT) { try space.store(at(0), 1) }
            #expect(try space.load(at(0)) == 0)
        }
        expect(["says that it has made an entry writable, and it is not"])
    }

    @Test func `a page that is freed while it is mapped is unmapped, and nobody writes to it afterwards`() throws {
        let driver = BrokenDriver(test.host)
        let space = test.space()
        let listener = ListeningNotifier(space)
        let free = test.memory.freeFrames
        space.register(listener)
        try space.mapPages(0, 4, .driver(driver))
        for page in 0..<4 { try space.store(at(page), 1) }
        let tables = free - test.memory.freeFrames
        driver.kept.free(from: driver)
        #expect(test.memory.freeFrames == free + 4 - tables)
        #expect((0..<4).allSatisfy { space.translate(at($0)) == nil } && listener.isBalanced && listener.starts == 1)
        // It goes on as if it had them.
        #expect(throws: UserFault.bus) { try space.access(at(0), store: 1) }
        expect(
            ["gives back a frame that is still mapped", "maps a frame that is not its own"],
            frame: driver.kept.frames[0])
        space.unregister(listener)
        space.exit()
    }

    @Test func `a block that goes back to the pool while a child maps it`() throws {
        let pool = GraphicsPool(host: test.host)
        let driver = BrokenDriver(test.host)
        let block = try #require(pool.takeBlock(order: 2, for: driver))
        driver.onFault = { space, vma, address in
            space.insertFrame(block.advanced(by: vma.backingPage(of: address)), at: address, in: vma)
        }
        try run(driver) { space in
            try space.store(at(3), 1)
            let child = try space.fork()
            try space.unmap(pages(0..<4))
            pool.giveBlock(block, order: 2, from: driver)
            #expect(child.translate(at(3)) == nil)
            child.exit()
        }
        expect(["gives back a frame that is still mapped"], frame: block.advanced(by: 3))
        #expect(pool.idleFrames == 4)
    }

    @Test func `what is given back twice, or was never its own, is not given`() throws {
        let pool = GraphicsPool(host: test.host)
        let driver = BrokenDriver(test.host)
        let other = BrokenDriver(test.host)
        let block = try #require(pool.takeBlock(order: 1, for: driver))
        pool.giveBlock(block, order: 1, from: other)
        pool.giveBlock(block, order: 1, from: driver)
        pool.giveBlock(block, order: 1, from: driver)
        #expect(pool.idleFrames == 2)
        let free = test.memory.freeFrames
        other.kept.free(from: driver)
        driver.kept.free(from: driver)
        driver.kept.free(from: driver)
        #expect(test.memory.freeFrames == free + 4)
        expect(Array(repeating: "gives back a frame that is not its own", count: 4))
    }

    @Test func `a counted entry holds its page: it may be given back`() throws {
        let driver = BrokenDriver(test.host, flags: .mixed)
        driver.onFault = { [unowned driver] space, vma, address in
            space.insertPage(driver.kept.frames[0], at: address, in: vma)
        }
        try run(driver) { space in
            try space.store(at(0), 7)
            driver.kept.free(from: driver)
            #expect(try space.load(at(0)) == 7)
        }
        expect([])
    }
}

@Suite struct OwnedFrameRanges {
    @Test(arguments: 1...20)
    func `any order of claims comes to the same set`(seed: UInt64) {
        var random = TestRandom(seed: seed)
        let owned = OwnedFrames()
        var model: Set<UInt64> = []
        for _ in 0..<300 {
            let low = UInt64.random(in: 0..<60, using: &random)
            let range = HostFrame(low)..<HostFrame(low + UInt64.random(in: 0..<9, using: &random))
            let numbers = Set(range.lowerBound.number..<range.upperBound.number)
            #expect(range.isEmpty || owned.contains(range) == numbers.isSubset(of: model), "seed \(seed)")
            if Bool.random(using: &random) {
                owned.add(range)
                model.formUnion(numbers)
            } else {
                let fits = numbers.isSubset(of: model)
                #expect(owned.remove(range) == fits, "seed \(seed)")
                if fits { model.subtract(numbers) }
            }
            let all = owned.all
            #expect(Set(all.flatMap { $0.map(\.number) }) == model, "seed \(seed)")
            #expect(zip(all, all.dropFirst()).allSatisfy { $0.upperBound < $1.lowerBound }, "seed \(seed)")
        }
    }
}
