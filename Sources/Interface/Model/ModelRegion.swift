import Frames
import HostMemory
import IoctlScript

/// What stands behind a region of a script's process.
struct ModelRegion {
    private enum Behind {
        case nothing
        case anonymous
        case sharedAnonymous
        case object(MemoryObject)
        case huge(HugePageFile)
        /// With the frames of RAM that it keeps until it is gone.
        case driver(DriverMapping, frames: Int)
        case graphics(GraphicsBuffer)
    }
    private let behind: Behind
    private let kind: HostKind

    /// Nil: no memory for it.
    init?(_ kind: HostKind, size: UInt64, _ host: Host, _ pool: HugePagePool?, largestFile: UInt64) {
        self.kind = kind
        let pages = Int(size >> pageShift)
        func driver<D: DriverMapping>(_ made: D?, _ frames: (D) -> Int) -> Behind? {
            made.map { .driver($0, frames: frames($0)) }
        }
        let behind: Behind? =
            switch kind {
            case .none: .nothing
            case .anonymous: .anonymous
            case .sharedAnonymous: .sharedAnonymous
            case .memfd, .memfdPrivate: .object(MemoryObject(host: host, pages: pages))
            case .file, .filePrivate:
                .object(
                    MemoryObject(host: host, file: Disk(pages: pages, largestFile: largestFile), bytes: Int(size)))
            case .secret: .object(MemoryObject(host: host, pages: pages, secret: true))
            case .hugetlb, .hugetlbPrivate:
                pool.map { .huge(HugePageFile($0, pages: Int(size / PageLevel.page2M.bytes))) }
            case .perfRing: driver(EventRing(host, dataPages: pages - 1, filling: .atMap)) { $0.frames.count }
            case .packetRing: driver(PacketRing(host, pages: pages)) { $0.pages }
            case .graphics: GraphicsBuffer(host, pages: pages, order: 0).map { .graphics($0) }
            case .deviceBAR: driver(DeviceBAR(host, pages: pages, filling: .byFault)) { _ in 0 }
            case .reserved: driver(pages <= 1024 ? ReservedMemory(host, pages: pages) : nil) { $0.frames.count }
            case .countedPFNMap: driver(CountedPagesByFrame(host, pages: pages)) { $0.frames.count }
            case .mixedmap: driver(MixedBuffer(host, pages: pages)) { $0.ownedFrames }
            case .dax: driver(DAXFile(host, pages: pages)) { $0.deviceFrames.count }
            }
        guard let behind else { return nil }
        self.behind = behind
    }

    var isShared: Bool {
        switch kind {
        case .memfdPrivate, .filePrivate, .hugetlbPrivate: false
        default: true
        }
    }

    var object: MemoryObject? {
        guard case .object(let object) = behind else { return nil }
        return object
    }

    var isHuge: Bool {
        guard case .huge = behind else { return false }
        return true
    }

    /// Nil: it is not mapped.
    func backing(firstHugePage: Int = 0) -> Backing? {
        switch behind {
        case .nothing: nil
        case .anonymous: .anonymous
        case .sharedAnonymous: .anonymousShared
        case .object(let object): .object(object, firstPage: 0, shared: isShared)
        case .huge(let file): .huge(file, firstPage: firstHugePage, shared: isShared)
        case .driver(let driver, _): .driver(driver)
        case .graphics(let buffer): .driver(buffer)
        }
    }

    /// Kernel: `ftruncate`. hugetlbfs can't shrink inside of a page.
    func truncate(to size: UInt64) throws(Errno) {
        guard case .object(let object) = behind else { throw .EINVAL }
        try object.setSize(Int(size))
    }

    /// Kernel: `fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)`. EINVAL for no length or one that reaches beyond
    /// what a file can be; EOPNOTSUPP of secret memory.
    func punch(_ offset: UInt64, _ length: UInt64) throws(Errno) {
        let (end, overflow) = offset.addingReportingOverflow(length)
        let largest = UInt64(Int64.max)
        guard length > 0, offset <= largest, length <= largest else { throw .EINVAL }
        switch behind {
        case .object(let object):
            if object.isSecret { throw .EOPNOTSUPP }
            guard !overflow, end <= largest else { throw .EINVAL }
            guard offset % pageSize == 0, length % pageSize == 0 else { throw .EINVAL }
            object.punchHole(Int(offset >> pageShift)..<Int(end >> pageShift))
        case .huge(let file):
            guard !overflow, end <= largest else { throw .EINVAL }
            file.punchHole(smallPages: Int(offset >> pageShift)..<Int(end >> pageShift))
        default: throw .EINVAL
        }
    }

    /// Gives back what can be given back; the frames of RAM that it keeps until it is gone.
    func release() -> Int {
        switch behind {
        case .nothing, .anonymous, .sharedAnonymous: return 0
        case .object(let object):
            object.truncate(to: 0)
            return 0
        case .huge(let file):
            file.free()
            return 0
        case .graphics(let buffer):
            buffer.free()
            buffer.pool.shrink()
            return 0
        case .driver(_, let frames): return frames
        }
    }
}

/// A ring of packets: counted pages in a mixed map, each of which get-user-pages can take. All of them come at mmap; what
/// is gone is not made again. Kernel: AF_PACKET's `packet_mmap`, `vm_insert_page`.
final class PacketRing: DriverMapping, @unchecked Sendable {
    // Unchecked: immutable.
    private let owned: DriverPages

    /// Nil: no memory.
    init?(_ host: Host, pages: Int) {
        guard let owned = DriverPages(host, count: pages) else { return nil }
        self.owned = owned
        super.init(name: "packet ring", flags: .mixed, refusals: .execution)
        claim(owned)
    }

    var pages: Int { owned.frames.count }

    override func mapped(_ space: AddressSpace, _ vma: VMAInfo) -> Errno? {
        guard vma.firstPage == 0, vma.pageCount == pages else { return .EINVAL }
        for (page, frame) in owned.frames.enumerated() {
            let result = space.insertPage(frame, at: vma.range.lowerBound + UInt64(page) * pageSize, in: vma)
            if result != .inserted { return .ENOMEM }
        }
        return nil
    }
}
