import Audit
import Frames
import Machine
import Testing

@testable import GuestMemory
@testable import HostMemory

/// The VM's view of its guest's memory, or its vCPU's.
enum Viewer: CaseIterable, Sendable {
    case machine, processor

    func read(_ guest: TestGuest, _ address: GuestAddress, _ count: Int) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0xee, count: count)
        try bytes.withUnsafeMutableBytes {
            switch self {
            case .machine: try guest.vm.readGuest(address, into: $0)
            case .processor: try guest.cpus[0].readGuest(address, into: $0)
            }
        }
        return bytes
    }

    func write(_ guest: TestGuest, _ address: GuestAddress, _ bytes: [UInt8]) throws {
        try bytes.withUnsafeBytes {
            switch self {
            case .machine: try guest.vm.writeGuest(address, from: $0)
            case .processor: try guest.cpus[0].writeGuest(address, from: $0)
            }
        }
    }

    func readPage(_ guest: TestGuest, _ page: Int, _ offset: UInt64, _ count: Int) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0xee, count: count)
        try bytes.withUnsafeMutableBytes {
            switch self {
            case .machine: try guest.vm.readGuest(gfn(page), offset: offset, into: $0)
            case .processor: try guest.cpus[0].readGuest(gfn(page), offset: offset, into: $0)
            }
        }
        return bytes
    }

    func writePage(_ guest: TestGuest, _ page: Int, _ offset: UInt64, _ bytes: [UInt8]) throws {
        try bytes.withUnsafeBytes {
            switch self {
            case .machine: try guest.vm.writeGuest(gfn(page), offset: offset, from: $0)
            case .processor: try guest.cpus[0].writeGuest(gfn(page), offset: offset, from: $0)
            }
        }
    }
}

extension TestGuest {
    func logged() throws -> [Int] { try vm.getDirtyLog(slot: 0).pages }

    func readAtomically(_ address: GuestAddress, _ count: Int) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0xee, count: count)
        try bytes.withUnsafeMutableBytes { try cpus[0].readGuestAtomically(address, into: $0) }
        return bytes
    }
}

/// `kvm_read_guest` and its relatives, row by row.
@Suite struct G2_16_GuestReadsAndWrites {
    @Test(arguments: Viewer.allCases)
    func `every offset and length across three pages reads back, and no byte beside it changes`(
        viewer: Viewer
    ) throws {
        let guest = TestGuest()
        try guest.addMemory(0, 3, log: true)
        var image = [UInt8](repeating: 0, count: 3 * 4096)
        var value: UInt8 = 0
        for offset in [0, 1, 7, 8, 63, 64, 4089, 4095, 4096, 8191] {
            for count in [0, 1, 2, 7, 8, 9, 15, 64, 65, 129, 4096, 4097] where offset + count <= image.count {
                let bytes = (0..<count).map { _ in
                    value = value &* 5 &+ 17
                    return value
                }
                try viewer.write(guest, gfn(0).address + UInt64(offset), bytes)
                image.replaceSubrange(offset..<offset + count, with: bytes)
                let written = count == 0 ? [] : Array(offset / 4096...(offset + count - 1) / 4096)
                #expect(try guest.logged() == written, "\(offset) \(count)")
                #expect(try viewer.read(guest, gfn(0).address + UInt64(offset), count) == bytes)
                #expect(try guest.logged() == [])
            }
        }
        #expect(try viewer.read(guest, gfn(0).address, image.count) == image)
        #expect(guest.test.events(.referenceTaken).isEmpty && guest.test.events(.pinTaken).isEmpty)
        guest.check()
    }

    @Test func `they go through the process's mapping: they fault, copy on write, and mark its entry`() throws {
        let guest = TestGuest()
        let object = MemoryObject(host: guest.test.host, pages: 1)
        try guest.space.mapPages(0, 1)
        try guest.space.mapPages(1, 1, .object(object, shared: false))
        try guest.setSlot(pages: 2)
        #expect(try Viewer.machine.read(guest, gfn(0).address, 8) == [UInt8](repeating: 0, count: 8))
        #expect(guest.frame(0) == guest.test.host.zeroPage)
        try Viewer.machine.write(guest, gfn(0).address, [5])
        #expect(try guest.space.load(at(0)) == 5 && guest.space.translate(at(0))?.dirty == true)
        try Viewer.machine.write(guest, gfn(1).address, [6])
        #expect(guest.frame(1) != object.frame(of: 0))
        let child = try guest.space.fork()
        defer { child.exit() }
        try Viewer.machine.write(guest, gfn(0).address, [7])
        #expect(try child.load(at(0)) == 5 && guest.space.load(at(0)) == 7)
        #expect(guest.load(0) == .value(7))
        guest.check()
    }

    @Test(arguments: Viewer.allCases)
    func `within a page: EFAULT beyond its end, without memory and without rights`(viewer: Viewer) throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 1)
        try guest.space.mapPages(1, 1, .anonymous, .read)
        try guest.space.mapPages(2, 1)
        try guest.setSlot(0, pages: 2, log: true)
        try guest.setSlot(1, guest: 2, pages: 1, readOnly: true)
        try guest.setSlot(2, guest: 3, pages: 1)
        for (offset, count) in [(4096, 1), (4095, 2), (1, 4096), (0, 4097)] as [(UInt64, Int)] {
            #expect(throws: Errno.EFAULT) { try viewer.readPage(guest, 0, offset, count) }
            #expect(throws: Errno.EFAULT) {
                try viewer.writePage(guest, 0, offset, [UInt8](repeating: 1, count: count))
            }
        }
        #expect(try viewer.readPage(guest, 0, 4090, 6) == [UInt8](repeating: 0, count: 6), "nothing was written")
        #expect(try guest.logged() == [])
        #expect(try viewer.readPage(guest, 1, 0, 1) == [0] && viewer.readPage(guest, 2, 0, 1) == [0])
        for page in [1, 2, 3, 9] { #expect(throws: Errno.EFAULT) { try viewer.writePage(guest, page, 0, [1]) } }
        for page in [3, 9] { #expect(throws: Errno.EFAULT) { try viewer.readPage(guest, page, 0, 1) } }
        #expect(try guest.logged() == [], "I-23, I-12: neither written nor logged")
    }

    @Test(arguments: Viewer.allCases)
    func `nothing is done for no bytes, but within a page the slot is looked up`(viewer: Viewer) throws {
        let guest = TestGuest()
        #expect(try viewer.read(guest, gfn(0).address, 0) == [])
        try viewer.write(guest, gfn(0).address, [])
        try guest.vm.clearGuest(gfn(0).address, count: 0)
        #expect(throws: Errno.EFAULT) { try viewer.readPage(guest, 0, 0, 0) }
        #expect(throws: Errno.EFAULT) { try viewer.writePage(guest, 0, 0, []) }
    }

    @Test(arguments: Viewer.allCases)
    func `the first page that fails ends it; what came before stays written and logged`(viewer: Viewer) throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 2)
        try guest.space.mapPages(3, 1)
        try guest.setSlot(pages: 4, log: true)
        let bytes = [UInt8](repeating: 9, count: 3 * 4096)
        #expect(throws: Errno.EFAULT) { try viewer.write(guest, gfn(0).address + 8, bytes) }
        #expect(try guest.logged() == [0, 1])
        #expect(try viewer.read(guest, gfn(1).address, 4096) == [UInt8](repeating: 9, count: 4096))
        #expect(try viewer.read(guest, gfn(3).address, 1) == [0])
        #expect(throws: Errno.EFAULT) { try viewer.read(guest, gfn(1).address, 4097) }
        #expect(throws: Errno.EFAULT) { try guest.vm.clearGuest(gfn(0).address, count: 3 * 4096) }
        #expect(try guest.logged() == [0, 1])
        #expect(try viewer.read(guest, gfn(0).address, 8192) == [UInt8](repeating: 0, count: 8192))
    }

    @Test func `a vCPU reads and writes the address space that it is in, the VM its first`() throws {
        let guest = TestGuest(addressSpaces: 2)
        try guest.space.mapPages(0, 2)
        try guest.setSlot(0, pages: 1, log: true)
        try guest.setSlot(1 << 16, pages: 1, host: 1, log: true)
        for page in 0..<2 { try guest.space.store(at(page), UInt64(page + 1)) }
        #expect(try Viewer.processor.read(guest, gfn(0).address, 1) == [1])
        guest.cpus[0].switchAddressSpace(to: 1)
        #expect(try Viewer.processor.read(guest, gfn(0).address, 1) == [2])
        #expect(try guest.readAtomically(gfn(0).address, 1) == [2])
        #expect(try Viewer.machine.read(guest, gfn(0).address, 1) == [1])
        try Viewer.processor.write(guest, gfn(0).address, [9])
        #expect(try guest.logged() == [])
        #expect(try guest.vm.getDirtyLog(slot: 1 << 16) == [1])
        #expect(try guest.space.load(at(0)) == 1 && guest.space.load(at(1)) == 9)
        guest.cpus[0].switchAddressSpace(to: 0)
        #expect(try Viewer.processor.read(guest, gfn(0).address, 1) == [1])
    }

    @Test func `with dirty rings, what a vCPU's task writes is in its ring`() throws {
        let guest = TestGuest.withRings(cpus: 2)
        try guest.addMemory(0, 8, log: true)
        let cpu = guest.cpus[1]
        let reader = DirtyRingReader(try guest.ring(1))
        try Viewer.processor.write(guest, gfn(7).address, [1])
        let bytes: [UInt8] = [1]
        try bytes.withUnsafeBytes { try cpu.writeGuest(gfn(0).address, from: $0) }
        try bytes.withUnsafeBytes { try guest.vm.writeGuest(gfn(1).address, from: $0, by: cpu) }
        try guest.vm.clearGuest(gfn(2).address, count: 1, by: cpu)
        try guest.vm.setGuestNumber(UInt8(1), at: gfn(3).address, by: cpu)
        let address = GuestAddressCache(guest.vm, by: cpu)
        try address.set(gfn(4).address, length: 1)
        try bytes.withUnsafeBytes { try address.write(from: $0) }
        let cache = FrameCache(guest.vm)
        try cache.activate(gfn(5).address, length: 8)
        try cache.withBytes(8) { $0.store(UInt8(1), by: cpu) }
        cache.deactivate()
        #expect(guest.collect(reader) == [0, 1, 2, 3, 4, 5])
        #expect(guest.collect(DirtyRingReader(try guest.ring(0))) == [7])
    }

    @Test func `clear writes zeros and nothing beside them`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 2, log: true)
        for (offset, count) in [(0, 8192), (3, 5), (100, 4096), (4095, 2), (8191, 1)] {
            var image = [UInt8](repeating: 0x5a, count: 8192)
            try Viewer.machine.write(guest, gfn(0).address, image)
            _ = try guest.logged()
            try guest.vm.clearGuest(gfn(0).address + UInt64(offset), count: count)
            image.replaceSubrange(offset..<offset + count, with: repeatElement(0, count: count))
            #expect(try Viewer.machine.read(guest, gfn(0).address, 8192) == image)
            #expect(try guest.logged() == Array(offset / 4096...(offset + count - 1) / 4096))
        }
        try guest.space.mapPages(9, 1)
        try guest.setSlot(1, guest: 9, pages: 1, readOnly: true)
        #expect(throws: Errno.EFAULT) { try guest.vm.clearGuest(gfn(9).address, count: 1) }
    }

    /// Memory goes away in the middle of a page's copy: what was written is there, so it is in the log (I-12).
    @Test func `a copy that ends early is logged`() throws {
        var partial = 0
        for point in 0... {
            let guest = TestGuest()
            let object = MemoryObject(host: guest.test.host, pages: 1)
            try guest.space.mapPages(0, 1, .object(object))
            try guest.setSlot(pages: 1, log: true)
            try guest.space.store(at(0), 0)
            let space = guest.space
            let interposer = Interposer(point) { #expect(throws: Never.self) { try space.unmap(pages(0..<1)) } }
            let failed = interposer.run {
                do {
                    try Viewer.machine.write(guest, gfn(0).address, [UInt8](repeating: 3, count: 4096))
                    return false
                } catch { return true }
            }
            guard interposer.hasFired else { break }
            let frame = try #require(object.frame(of: 0))
            let bytes = UnsafeRawBufferPointer(start: guest.test.memory.bytes(of: frame), count: 4096)
            let written = bytes.filter { $0 == 3 }.count
            #expect(failed == (written < 4096))
            if written > 0, failed { partial += 1 }
            #expect(try guest.logged() == (written > 0 ? [0] : []), "point \(point): \(written) bytes")
        }
        #expect(partial > 10)
    }

    @Test func `an atomic read takes what is there and never sleeps`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 2)
        try guest.space.store(at(0), 0x0807_0605_0403_0201)
        guest.vm.mmuLock.lockForWrite()
        #expect(try guest.readAtomically(gfn(0).address + 1, 4) == [2, 3, 4, 5])
        #expect(throws: Errno.EFAULT) { try guest.readAtomically(gfn(1).address, 1) }
        #expect(guest.frame(1) == nil, "nothing is faulted in")
        #expect(throws: Errno.EFAULT) { try guest.readAtomically(gfn(0).address + 4092, 8) }
        #expect(throws: Errno.EFAULT) { try guest.readAtomically(gfn(5).address, 1) }
        guest.vm.mmuLock.unlockWrite()
        _ = try guest.space.load(at(1))
        #expect(try guest.readAtomically(gfn(1).address, 1) == [0])
        guest.space.hintNUMA(pages(0..<1))
        #expect(throws: Errno.EFAULT) { try guest.readAtomically(gfn(0).address, 1) }
    }

    @Test func `numbers: both directions want memory that can be written, and a write is logged`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 2, log: true)
        try guest.vm.setGuestNumber(UInt32(0x0403_0201), at: gfn(0).address + 6)
        #expect(try guest.logged() == [0])
        #expect(try guest.vm.guestNumber(at: gfn(0).address + 6) as UInt32 == 0x0403_0201)
        #expect(try guest.vm.guestNumber(at: gfn(0).address + 7, as: UInt8.self) == 2)
        #expect(try guest.logged() == [])
        #expect(throws: Errno.EFAULT) { try guest.vm.guestNumber(at: gfn(0).address + 4090, as: UInt64.self) }
        #expect(throws: Errno.EFAULT) { try guest.vm.setGuestNumber(UInt64(1), at: gfn(0).address + 4090) }
        try guest.space.mapPages(8, 1)
        try guest.setSlot(1, guest: 8, pages: 1, readOnly: true)
        #expect(throws: Errno.EFAULT) { try guest.vm.guestNumber(at: gfn(8).address, as: UInt64.self) }
        #expect(throws: Errno.EFAULT) { try guest.vm.setGuestNumber(UInt64(1), at: gfn(8).address) }
        try guest.space.unmap(pages(1..<2))
        #expect(throws: Errno.EFAULT) { try guest.vm.guestNumber(at: gfn(1).address, as: UInt64.self) }
        #expect(try guest.logged() == [])
    }
}

/// `gfn_to_hva_cache`.
@Suite struct G2_17_AddressCache {
    private func read(_ cache: GuestAddressCache, _ offset: UInt64 = 0, _ count: Int) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0xee, count: count)
        try bytes.withUnsafeMutableBytes { try cache.read(at: offset, into: $0) }
        return bytes
    }

    private func write(_ cache: GuestAddressCache, _ offset: UInt64 = 0, _ bytes: [UInt8]) throws {
        try bytes.withUnsafeBytes { try cache.write(at: offset, from: $0) }
    }

    private func prepared() throws -> TestGuest {
        let guest = TestGuest()
        try guest.space.mapPages(0, 12)
        try guest.setSlot(0, pages: 4, log: true)
        try guest.setSlot(1, guest: 4, pages: 2)
        try guest.setSlot(2, guest: 6, pages: 2, readOnly: true)
        return guest
    }

    @Test func `EINVAL for a range that wraps or is empty at the beginning of a page`() throws {
        let guest = try prepared()
        let cache = GuestAddressCache(guest.vm)
        for (address, length) in [
            (gfn(1).address, 0), (gfn(1).address, .max - 100), (GuestAddress(.max - 10), 20),
        ] as [(GuestAddress, UInt64)] {
            #expect(throws: Errno.EINVAL) { try cache.set(address, length: length) }
            #expect(throws: Errno.EFAULT) { try read(cache, 0, 0) }
        }
        try cache.set(gfn(1).address + 8, length: 0)
        #expect(try read(cache, 0, 0) == [])
    }

    @Test func `EFAULT unless every page is in a slot that can be written`() throws {
        let guest = try prepared()
        let cache = GuestAddressCache(guest.vm)
        for (page, count) in [(6, 1), (5, 2), (8, 1), (0, 9), (3, 4)] {
            #expect(throws: Errno.EFAULT, "\(page) \(count)") {
                try cache.set(gfn(page).address, length: UInt64(count) * pageSize)
            }
            #expect(throws: Errno.EFAULT) { try read(cache, 0, 1) }
        }
        try cache.set(gfn(0).address, length: 6 * pageSize)
        #expect(try read(cache, 0, 1) == [0])
    }

    @Test func `one page and more than one, within one slot and across two`() throws {
        let guest = try prepared()
        for (page, offset, length) in [(0, 0, 4096), (1, 100, 50), (2, 4000, 200), (3, 10, 8000)] {
            let cache = GuestAddressCache(guest.vm)
            try cache.set(gfn(page).address + UInt64(offset), length: UInt64(length))
            let bytes = (0..<length).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ page) }
            try write(cache, 0, bytes)
            #expect(try read(cache, 0, length) == bytes)
            #expect(try Viewer.machine.read(guest, gfn(page).address + UInt64(offset), length) == bytes)
            let first = page
            let last = page + (offset + length - 1) / 4096
            #expect(try guest.logged() == Array(first...last).filter { $0 < 4 })
            try write(cache, 5, [1, 2])
            #expect(try read(cache, 4, 4) == [bytes[4], 1, 2, bytes[7]])
            #expect(try guest.logged() == [page + (offset + 5) / 4096].filter { $0 < 4 })
            #expect(throws: Errno.EINVAL) { try read(cache, UInt64(length), 1) }
            #expect(throws: Errno.EINVAL) { try write(cache, UInt64(length) - 1, [1, 2]) }
            #expect(throws: Errno.EINVAL) { try read(cache, .max, 2) }
        }
        #expect(guest.test.events(.referenceTaken).isEmpty)
    }

    @Test func `another generation is another lookup`() throws {
        let guest = try prepared()
        try guest.space.store(at(1), 1)
        try guest.space.store(at(9), 2)
        let cache = GuestAddressCache(guest.vm)
        try cache.set(gfn(1).address, length: 8)
        #expect(try read(cache, 0, 1) == [1])
        try guest.deleteSlot(0)
        #expect(throws: Errno.EFAULT) { try read(cache, 0, 1) }
        #expect(throws: Errno.EFAULT) { try write(cache, 0, [1]) }
        try guest.setSlot(0, pages: 4, host: 8)
        #expect(try read(cache, 0, 1) == [2])
        try guest.setSlot(0, pages: 4, host: 8, log: true)
        try write(cache, 0, [3])
        #expect(try guest.logged() == [1], "the slot that logs now")
        #expect(try guest.space.load(at(9)) == 3 && guest.space.load(at(1)) == 1)
    }

    @Test func `the process may take the memory away`() throws {
        let guest = try prepared()
        let cache = GuestAddressCache(guest.vm)
        try cache.set(gfn(1).address, length: 8)
        try guest.space.unmap(pages(1..<2))
        #expect(throws: Errno.EFAULT) { try read(cache, 0, 1) }
        #expect(throws: Errno.EFAULT) { try write(cache, 0, [1]) }
        #expect(try guest.logged() == [])
        try guest.space.mapPages(1, 1)
        #expect(try read(cache, 0, 1) == [0])
    }
}

/// `kvm_host_page_size`.
@Suite struct G2_18_HostPageSize {
    @Test func `the pages of the process's area, 4 KiB where there is none`() throws {
        let guest = TestGuest(ramFrames: 4096, thp: true)
        let pool = try #require(HugePagePool(guest.test.host, level: .page2M, pages: 1))
        let file = HugePageFile(pool, pages: 1)
        try guest.space.mapPages(0, 512)
        try guest.space.map(at: at(1024), length: 512 * pageSize, protection: .readWrite, backing: .huge(file))
        try guest.setSlot(0, pages: 600)
        try guest.setSlot(1, guest: 700, pages: 512, host: 1024, readOnly: true)
        try guest.space.store(at(0), 1)
        #expect(guest.space.translate(at(0))?.level == .page2M)
        let cpu = guest.cpus[0]
        #expect(cpu.hostPageSize(gfn(0)) == 4096, "what comes and goes by itself does not count")
        #expect(cpu.hostPageSize(gfn(700)) == 2 << 20 && cpu.hostPageSize(gfn(1211)) == 2 << 20, "read-only or not")
        #expect(cpu.hostPageSize(gfn(599)) == 4096, "a hole, before huge pages")
        #expect(cpu.hostPageSize(gfn(650)) == 4096, "no slot")
    }
}
