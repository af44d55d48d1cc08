import Audit
import Frames
import HostMemory
import Machine
import Testing

@testable import GuestMemory

/// Guest memory, or the process's own.
enum CacheKind: CaseIterable, Sendable {
    case guest, user

    func activate(_ cache: FrameCache, _ page: Int, offset: UInt64 = 0, length: UInt64 = 8) throws(Errno) {
        switch self {
        case .guest: try cache.activate(gfn(page).address + offset, length: length)
        case .user: try cache.activate(user: at(page, offset), length: length)
        }
    }
}

extension FrameCache {
    /// The word at the beginning, if the cache is valid.
    func word(_ length: UInt64 = 8) -> UInt64? {
        let guardian = lockForUse()
        guard let bytes = guardian.check(length) else { return nil }
        return bytes.load()
    }

    var isUsable: Bool {
        let guardian = lockForUse()
        guard guardian.check(1) != nil else { return false }
        return true
    }
}

extension TestGuest {
    func cache(_ kind: CacheKind, _ page: Int, offset: UInt64 = 0) throws(Errno) -> FrameCache {
        let cache = FrameCache(vm)
        try kind.activate(cache, page, offset: offset)
        return cache
    }
}

/// `gfn_to_pfn_cache`, its operations row by row.
@Suite struct G2_14_FrameCache {
    @Test func `a cache that was only made is inactive and knows no place`() throws {
        let guest = TestGuest()
        let cache = FrameCache(guest.vm)
        #expect(cache.word() == nil)
        #expect(throws: Errno.EINVAL) { try cache.refresh(length: 8) }
        cache.deactivate()
        #expect(guest.vm.frameCaches.all.isEmpty)
    }

    @Test(arguments: CacheKind.allCases, Architecture.twoStage)
    func `an active cache reads and writes what the process and the guest see`(
        kind: CacheKind, architecture: Architecture
    ) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 2)
        try guest.space.store(at(1, 16), 7)
        let cache = try guest.cache(kind, 1, offset: 16)
        #expect(cache.word() == 7)
        try cache.withBytes(16) { bytes in
            #expect(bytes.count == 16)
            bytes.store(UInt64(8))
            bytes.store(UInt16(0x1234), at: 11)
        }
        #expect(try guest.space.load(at(1, 16)) == 8)
        #expect(try guest.space.load(at(1, 24)) == 0x1234 << 24)
        #expect(guest.cpus[0].access(.read, gfn(1).address + 16) == .value(8))
        #expect(cache.frame == guest.frame(1) && guest.vm.cachedFrameCount == 1)
        cache.deactivate()
        guest.check()
    }

    @Test func `EINVAL at once, and the cache is not even listed`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 2)
        let cache = FrameCache(guest.vm)
        #expect(throws: Errno.EINVAL) { try cache.activate(GuestAddress(.max), length: 1) }
        #expect(throws: Errno.EINVAL) { try cache.activate(user: .end, length: 1) }
        #expect(throws: Errno.EINVAL) { try cache.activate(user: UserAddress(1 << 63), length: 1) }
        for kind in CacheKind.allCases {
            for (offset, length) in [(4095, 2), (1, 4096), (0, 4097), (8, .max)] as [(UInt64, UInt64)] {
                #expect(throws: Errno.EINVAL, "\(offset) \(length)") {
                    try kind.activate(cache, 0, offset: offset, length: length)
                }
            }
        }
        #expect(guest.vm.frameCaches.all.isEmpty && !cache.isActive)
        for (offset, length) in [(0, 4096), (4095, 1), (4088, 8)] as [(UInt64, UInt64)] {
            try CacheKind.guest.activate(cache, 0, offset: offset, length: length)
            #expect(cache.isUsable)
        }
        cache.deactivate()
    }

    /// Page, and how to make it usable.
    private func addUnusable(_ guest: TestGuest) throws -> [(page: Int, mend: () throws -> Void)] {
        let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .byFault))
        let readOnly = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .atMap))
        try guest.space.mapPages(0, 1)
        try guest.space.mapPages(1, 1, .anonymous, .read)
        try guest.space.mapPages(2, 1)
        try guest.space.store(at(2), 1)
        guest.test.host.poison(try #require(guest.frame(2)))
        try guest.space.mapPages(3, 1, .driver(bar))
        bar.disable()
        try guest.space.mapPages(4, 1, .driver(readOnly), .read)
        try guest.setSlot(0, pages: 6)
        let space = guest.space
        return [
            (1, { try space.protect(pages(1..<2), .readWrite) }),
            (
                2,
                {
                    try space.unmap(pages(2..<3))
                    try space.mapPages(2, 1)
                }
            ),
            (3, { bar.enable() }),
            (
                4,
                {
                    try space.unmap(pages(4..<5))
                    try space.mapPages(4, 1)
                }
            ),
            (5, { try space.mapPages(5, 1) }),
        ]
    }

    @Test(arguments: CacheKind.allCases)
    func `EFAULT without such memory; the cache is active all the same and may be refreshed`(kind: CacheKind) throws {
        let guest = TestGuest()
        for (page, mend) in try addUnusable(guest) {
            let cache = FrameCache(guest.vm)
            #expect(throws: Errno.EFAULT, "page \(page)") { try kind.activate(cache, page) }
            #expect(cache.isActive && guest.vm.frameCaches.all.count == 1)
            #expect(!cache.isValid && cache.frame == nil && cache.word() == nil)
            #expect(throws: Errno.EFAULT) { try cache.refresh(length: 8) }
            try mend()
            try cache.refresh(length: 8)
            #expect(cache.word() != nil && cache.frame == guest.frame(page), "page \(page)")
            cache.deactivate()
        }
        #expect(guest.vm.cachedFrameCount == 0)
    }

    @Test func `EFAULT for guest memory in no slot, in a read-only one, and in one that is being deleted`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 2)
        let cache = FrameCache(guest.vm)
        #expect(throws: Errno.EFAULT) { try cache.activate(gfn(0).address, length: 8) }
        try guest.setSlot(pages: 2, readOnly: true)
        #expect(throws: Errno.EFAULT) { try cache.refresh(length: 8) }
        try guest.deleteSlot()
        try guest.setSlot(pages: 2)
        try cache.refresh(length: 8)
        #expect(cache.isUsable)
        var seen: Errno?
        let interposer = Interposer(0) {
            do throws(Errno) { try cache.refresh(length: 8) } catch { seen = error }
            #expect(!cache.isUsable)
        }
        interposer.ignoring(.slots)
        interposer.mayFire = { guest.vm.slot(containing: gfn(0))?.isInvalid == true }
        try interposer.run { try guest.deleteSlot() }
        #expect(seen == .EFAULT)
        cache.deactivate()
    }

    @Test(arguments: CacheKind.allCases)
    func `EFAULT where the kernel can't map the frame, and nothing is held`(kind: CacheKind) throws {
        let guest = TestGuest()
        guest.vm.remapsDeviceMemory = false
        let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .atMap))
        try guest.space.mapPages(0, 1, .driver(bar))
        try guest.space.mapPages(1, 1)
        try guest.setSlot(pages: 2)
        let cache = FrameCache(guest.vm)
        #expect(throws: Errno.EFAULT) { try kind.activate(cache, 0) }
        #expect(cache.isActive && cache.frame == nil)
        try kind.activate(cache, 1)
        #expect(cache.isUsable)
        #expect(throws: Errno.EFAULT) { try kind.activate(cache, 0) }
        #expect(!cache.isUsable && guest.vm.cachedFrameCount == 0, "what was mapped before is gone too")
        cache.deactivate()
    }

    @Test(arguments: CacheKind.allCases)
    func `memory mapped by frame number is taken, whatever allow_unsafe_mappings says`(kind: CacheKind) throws {
        for unsafe in [false, true] {
            let guest = TestGuest(unsafe: unsafe)
            let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .byFault))
            let buffer = try #require(GraphicsBuffer(guest.test.host, pages: 2, order: 1))
            try guest.space.mapPages(0, 1, .driver(bar))
            try guest.space.mapPages(1, 1, .driver(buffer, firstPage: 1))
            try guest.setSlot(pages: 2)
            for page in 0..<2 {
                let cache = try guest.cache(kind, page)
                try cache.withBytes(8) { $0.store(UInt64(page + 5)) }
                #expect(try guest.space.load(at(page)) == UInt64(page + 5))
                cache.deactivate()
            }
            #expect(guest.test.events(.referenceTaken).isEmpty)
        }
    }

    @Test(arguments: CacheKind.allCases)
    func `a check asks for active, valid, in the page, and of guest memory for the slots' generation`(
        kind: CacheKind
    ) throws {
        let guest = TestGuest()
        try guest.addMemory(0, 2)
        try guest.space.mapPages(9, 1)
        let cache = try guest.cache(kind, 0, offset: 4080)
        #expect(cache.word(16) != nil && cache.word(17) == nil && cache.word(.max) == nil)
        try guest.setSlot(1, guest: 9, pages: 1)
        #expect(cache.isUsable == (kind == .user))
        let translations = guest.test.events(.referenceTaken).count
        try cache.refresh(length: 8)
        #expect(cache.isUsable)
        #expect(guest.test.events(.referenceTaken).count == translations, "the place is where it was, and stays mapped")
        #expect(throws: Errno.EINVAL) { try cache.refresh(length: 17) }
        cache.deactivate()
        #expect(!cache.isUsable)
    }

    @Test(arguments: CacheKind.allCases)
    func `an invalidation of its page makes it invalid, one beside it does not`(kind: CacheKind) throws {
        let guest = TestGuest()
        try guest.addMemory(0, 3)
        let cache = try guest.cache(kind, 1, offset: 4088)
        try guest.space.advise(pages(0..<1), .dontNeed)
        try guest.space.advise(pages(2..<3), .dontNeed)
        #expect(cache.isUsable)
        try cache.withBytes(8) { $0.store(UInt64(3)) }
        let frame = cache.frame
        try guest.space.advise(pages(1..<2), .dontNeed)
        #expect(
            !cache.isUsable && cache.frame == frame && guest.vm.cachedFrameCount == 1, "unmapped by the next refresh")
        try cache.refresh(length: 8)
        #expect(cache.word() == 0 && cache.frame == guest.frame(1) && guest.vm.cachedFrameCount == 1)
        cache.deactivate()
        guest.check()
    }

    @Test func `of memory that no slot shows, too`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 1)
        let cache = try guest.cache(.user, 0)
        try cache.withBytes(8) { $0.store(UInt64(3)) }
        try guest.space.advise(pages(0..<1), .dontNeed)
        #expect(!cache.isUsable)
        #expect(guest.vm.invalidateSequence.load(ordering: .relaxed) == 0, "the guest's faults have no part in it")
        try cache.withBytes(8) { #expect($0.load(as: UInt64.self) == 0) }
        cache.deactivate()
    }

    @Test func `guest memory follows its slot to another place of the process`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 1)
        try guest.space.mapPages(8, 1)
        try guest.space.store(at(0), 1)
        try guest.space.store(at(8), 2)
        try guest.setSlot(pages: 1)
        let cache = try guest.cache(.guest, 0)
        #expect(cache.word() == 1)
        try guest.deleteSlot()
        try guest.setSlot(pages: 1, host: 8)
        #expect(cache.word() == nil, "another generation")
        try cache.refresh(length: 8)
        #expect(cache.word() == 2 && guest.vm.cachedFrameCount == 1)
        cache.deactivate()
    }

    @Test func `an active cache goes to another place, and to the other kind`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 2, log: true)
        try guest.space.mapPages(4, 1)
        for page in [0, 1, 4] { try guest.space.store(at(page), UInt64(page + 1)) }
        _ = try guest.vm.getDirtyLog(slot: 0)
        let cache = try guest.cache(.guest, 0)
        try cache.activate(gfn(1).address, length: 8)
        #expect(cache.word() == 2 && guest.vm.frameCaches.all.count == 1)
        try cache.activate(user: at(4), length: 8)
        #expect(cache.word() == 5)
        try cache.withBytes(8) { $0.store(UInt64(9)) }
        #expect(try guest.vm.getDirtyLog(slot: 0) == [0], "no longer of that slot")
        try cache.activate(gfn(0).address, length: 8)
        #expect(cache.word() == 1 && guest.vm.cachedFrameCount == 1)
        #expect(throws: Errno.EFAULT) { try cache.activate(gfn(30).address, length: 8) }
        #expect(cache.word() == nil && guest.vm.cachedFrameCount == 0 && cache.isActive)
        cache.deactivate()
        guest.check()
    }

    @Test(arguments: CacheKind.allCases)
    func `deactivated, it is nowhere, keeps its place, and can be activated again`(kind: CacheKind) throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        let cache = try guest.cache(kind, 0)
        for _ in 0..<2 {
            cache.deactivate()
            #expect(!cache.isActive && !cache.isValid && cache.frame == nil && cache.userAddress == at(0))
            #expect(guest.vm.frameCaches.all.isEmpty && guest.vm.cachedFrameCount == 0)
            #expect(throws: Errno.EINVAL) { try cache.refresh(length: 8) }
        }
        try kind.activate(cache, 0)
        #expect(cache.isUsable)
        cache.deactivate()
    }

    @Test(arguments: CacheKind.allCases)
    func `a write is logged for guest memory in a logged slot, and the page itself is not marked dirty`(
        kind: CacheKind
    ) throws {
        let guest = TestGuest()
        try guest.addMemory(0, 3, log: true)
        let cache = try guest.cache(kind, 1)
        #expect(try guest.vm.getDirtyLog(slot: 0) == [0], "to refresh is not to write")
        try cache.withBytes(8) { #expect($0.load(as: UInt64.self) == 0) }
        #expect(try guest.vm.getDirtyLog(slot: 0) == [0])
        try cache.withBytes(8) { $0.store(UInt8(1), at: 7) }
        #expect(try guest.vm.getDirtyLog(slot: 0) == [kind == .guest ? 2 : 0])
        try cache.withBytes(8) { $0.markDirty() }
        #expect(try guest.vm.getDirtyLog(slot: 0) == [kind == .guest ? 2 : 0])
        let state = guest.test.state(try #require(guest.frame(1)))
        #expect(!state.flags.isDirty(by: .kvm) && state.flags.isAccessed(by: .kvm))
        cache.deactivate()
    }

    @Test func `a refresh that breaks copy-on-write itself tries again once and converges`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        try guest.space.store(at(0), 9)
        let child = try guest.space.fork()
        defer { child.exit() }
        let cache = try guest.cache(.guest, 0)
        #expect(guest.test.events(.referenceTaken).count <= 2)
        #expect(cache.word() == 9)
        try cache.withBytes(8) { $0.store(UInt64(10)) }
        #expect(try child.load(at(0)) == 9 && guest.space.load(at(0)) == 10)
        cache.deactivate()
    }

    @Test(arguments: [PolicyName.tracked, .guess])
    func `the old policies keep nothing either`(policy: PolicyName) throws {
        let guest = TestGuest(policy: policy)
        let counted = try #require(CountedPagesByFrame(guest.test.host, pages: 1))
        try guest.space.mapPages(0, 1)
        try guest.space.mapPages(1, 1, .driver(counted))
        try guest.setSlot(pages: 2)
        for page in 0..<2 {
            let cache = try guest.cache(.guest, page)
            #expect(cache.isUsable && guest.heldReferences == 0)
            #expect(guest.test.state(try #require(guest.frame(page))).referenceCount == 1)
            cache.deactivate()
        }
        guest.expectedFindings = guest.test.journal.findings.count
    }

    @Test func `I-28: a cache that its owner forgot is found when the VM goes`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        let cache = try guest.cache(.guest, 0)
        guest.expectedFindings = 1
        guest.takeDown()
        #expect(guest.test.journal.findings.map(\.invariant) == [.i28])
        #expect(!cache.isActive)
    }
}
