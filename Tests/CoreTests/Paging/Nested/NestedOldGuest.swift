import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// Guest hypervisors whose paging has fewer than four levels, and so the nested tables that they make. Spec: x86 4.4, 4.10.
enum OldPaging: CaseIterable, Sendable {
    /// Directory 1; table 2 maps page `n` of each half to frame 16 + `n`, for the first 4 MiB and for those after 1 GiB.
    case twoLevels
    /// Pointers at the start of frame 1; the first GiB has directory 2 and table 3, the fourth directory 4 and table 3.
    case extended

    var registers: GuestRegisters { self == .twoLevels ? .twoLevels(0x1000) : .physicalExtension(0x1000) }
    var lowestTable: Int { self == .twoLevels ? 2 : 3 }
    var directory: Int { self == .twoLevels ? 1 : 2 }
    /// Another address of page 0 of the first table, under another root.
    var otherBase: UInt64 { self == .twoLevels ? 0x4000_0000 : 0xc000_0000 }

    static let table: UInt64 = 0x67
    static let page: UInt64 = 0x67

    static func leaf(_ page: Int, _ bits: UInt64 = OldPaging.page) -> UInt64 {
        UInt64(NestedGuest.firstFrame + page) << 12 | bits
    }
}

extension NestedGuest {
    static func old(
        _ paging: OldPaging, levels: UInt8 = 4, cpus: Int = 1, pages: Int = 64, ramFrames: Int = 1024,
        thp: Bool = false,
        flags: UInt64 = OldPaging.page, _ change: (inout TDPConfiguration) -> Void = { _ in }
    ) throws -> NestedGuest {
        let guest = try NestedGuest(pages: pages, cpus: cpus, ramFrames: ramFrames, thp: thp) {
            $0.format = .npt
            $0.levels = levels
            change(&$0)
        }
        try guest.makeOldTables(paging, flags)
        return guest
    }

    func makeOldTables(_ paging: OldPaging, _ flags: UInt64 = OldPaging.page) throws {
        switch paging {
        case .twoLevels:
            for index in [0, 256] { try write(paging, 1, index, 0x2000 | flags) }
            for i in 0..<32 {
                for half in [0, 512] { try write(paging, 2, half + i, OldPaging.leaf(i, flags)) }
            }
        case .extended:
            for (index, directory) in [(0, 2), (3, 4)] {
                try write(1, index, UInt64(directory) << 12 | 1)
                try write(directory, 0, 0x3000 | flags)
            }
            for i in 0..<32 { try write(3, i, OldPaging.leaf(i, flags)) }
        }
    }

    /// Of 4 bytes or of 8.
    func write(_ paging: OldPaging, _ frame: Int, _ index: Int, _ entry: UInt64) throws {
        guard paging == .twoLevels else { return try write(frame, index, entry) }
        try space.storeHalf(at(frame) + UInt64(index) * 4, entry)
    }
    func entry(_ paging: OldPaging, _ frame: Int, _ index: Int) throws -> UInt64 {
        guard paging == .twoLevels else { return try entry(frame, index) }
        return try space.loadHalf(at(frame) + UInt64(index) * 4)
    }

    func enter(_ paging: OldPaging, _ cpu: NestedCPU? = nil) throws {
        try mmu.enterNested(paging.registers, cpu ?? self.cpu)
    }

    func expectExit(_ access: PagedAccess, _ address: UInt64, _ code: UInt64, table: Bool = false) {
        let exit = NestedExit.pageFault(GuestAddress(address), code: code | (table ? 1 << 33 : 1 << 32))
        #expect(cpu.access(access, at: address) == .nestedExit(exit))
    }

    /// Of the pages found or made since the start.
    func taken() -> [PageRole] { test.events(.shadowPageTaken).map { PageRole(rawValue: UInt32($0.value)) } }
}

extension AddressSpace {
    /// 4 bytes, as the VMM would.
    func storeHalf(_ place: UserAddress, _ value: UInt64) throws {
        let (word, shift) = (UserAddress(place.value & ~7), (place.value & 4) * 8)
        try store(word, try load(word) & ~(0xffff_ffff << shift) | (value & 0xffff_ffff) << shift)
    }
    func loadHalf(_ place: UserAddress) throws -> UInt64 {
        try load(UserAddress(place.value & ~7)) >> ((place.value & 4) * 8) & 0xffff_ffff
    }
}
