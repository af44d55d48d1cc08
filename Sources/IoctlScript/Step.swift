// IoctlScript: scripts of KVM's memory calls as plain text, and what came of each call as plain text.
//
// It guarantees that a script is read as a whole, with all its names resolved, before anything runs, and that what it prints
// holds nothing that differs between two hosts that answer alike: no address, no descriptor, no time. It knows neither the
// model nor a kernel: whoever can perform a `Step` is an `Executor`. Read `ScriptReader.swift` next, then `Answer.swift`.

import CKVMInterface

/// One call of a script. Things with names are numbered in the order in which the script makes them.
public enum Step: Sendable, Equatable {
    // The process's memory.
    case host(region: Int, HostKind, size: UInt64, Rights)
    case map(HostPlace, length: UInt64, Rights, MapSource, replaces: Bool)
    case unmap(HostPlace, length: UInt64)
    case protect(HostPlace, length: UInt64, Rights)
    case advise(HostPlace, length: UInt64, Advice)
    case remap(HostPlace, length: UInt64, newLength: UInt64, to: HostPlace?)
    case truncate(region: Int, size: UInt64)
    case punchHost(region: Int, offset: UInt64, length: UInt64)
    case load(HostPlace, Repetition)
    case store(HostPlace, Repetition, value: UInt64)
    /// A page goes into the process's pipe, which holds a reference to it. Kernel: `vmsplice`.
    case splice(HostPlace)
    /// The pipe is closed, with what it holds.
    case drain
    case fork(process: Int)
    case exit
    // KVM.
    case createVM(vm: Int, type: UInt64)
    case createCPU(CPU, id: UInt64)
    case close(Descriptor)
    case setRegion(vm: Int, Region, version: Int)
    case getDirtyLog(vm: Int, slot: UInt64, hasBuffer: Bool)
    case clearDirtyLog(vm: Int, ClearedPages)
    case enableCapability(vm: Int, capability: UInt64, flags: UInt64, arguments: [UInt64])
    /// Nil: asked of the device.
    case checkExtension(vm: Int?, capability: UInt64)
    case createMemfd(vm: Int, memfd: Int, size: UInt64, flags: UInt64)
    case allocate(memfd: Int, mode: UInt64, offset: UInt64, length: UInt64)
    case setAttributes(vm: Int, address: UInt64, size: UInt64, attributes: UInt64, flags: UInt64)
    case preFault(CPU, address: UInt64, size: UInt64, flags: UInt64)
    case collectRing(CPU, most: UInt64)
    case resetRings(vm: Int)
    /// The call without the structure that it takes: EFAULT, after what the descriptor itself has to say.
    case withoutArgument(vm: Int, StructureCall)
    /// Nil: the VM's own.
    case statistics(vm: Int, cpu: Int?, names: [String])
    case guest(CPU, GuestAccess)
}

/// A vCPU: its VM, and its place among those that the script makes.
public struct CPU: Sendable, Equatable {
    public var vm: Int
    public var cpu: Int
    public init(vm: Int, cpu: Int) {
        self.vm = vm
        self.cpu = cpu
    }
}

/// A call of a VM's descriptor that takes a structure, as scripts name it.
public enum StructureCall: String, Sendable, CaseIterable {
    case region
    case region2
    case getDirtyLog = "get_dirty_log"
    case clearDirtyLog = "clear_dirty_log"
    case enableCapability = "enable_cap"
    case memfd
    case attributes

    /// The ioctl's number.
    public var request: UInt32 {
        switch self {
        case .region: KVM_SET_USER_MEMORY_REGION
        case .region2: KVM_SET_USER_MEMORY_REGION2
        case .getDirtyLog: KVM_GET_DIRTY_LOG
        case .clearDirtyLog: KVM_CLEAR_DIRTY_LOG
        case .enableCapability: KVM_ENABLE_CAP
        case .memfd: KVM_CREATE_GUEST_MEMFD
        case .attributes: KVM_SET_MEMORY_ATTRIBUTES
        }
    }
}

public enum Descriptor: Sendable, Equatable {
    case vm(Int)
    case cpu(CPU)
    case memfd(Int)
}

/// What a region of the process's memory is.
public enum HostKind: String, Sendable, CaseIterable {
    /// The name and the addresses, and nothing mapped.
    case none
    case anonymous
    case sharedAnonymous = "shared_anonymous"
    /// A memfd, shared or private.
    case memfd
    case memfdPrivate = "memfd_private"
    /// A file with a page cache, shared or private.
    case file
    case filePrivate = "file_private"
    case secret
    /// Huge pages of 2 MiB of a pool, shared or private.
    case hugetlb
    case hugetlbPrivate = "hugetlb_private"
    /// The ring of perf events: its first page is a writable PFN map that becomes so on demand.
    case perfRing = "perf_ring"
    /// A ring of packets: VM_MIXEDMAP with counted pages.
    case packetRing = "packet_ring"
    // Drivers of the model, which a real process can't have at will.
    case graphics
    case deviceBAR = "device_bar"
    case reserved
    case countedPFNMap = "counted_pfnmap"
    /// VM_MIXEDMAP whose odd pages are frames of a device.
    case mixedmap
    case dax

    /// Whether any Linux host can give it to a process.
    public var isPortable: Bool {
        switch self {
        case .graphics, .deviceBAR, .reserved, .countedPFNMap, .mixedmap, .dax: false
        default: true
        }
    }

    /// Whether something stands behind the mapping that can be truncated, punched, or mapped once more.
    public var hasObject: Bool {
        switch self {
        case .memfd, .memfdPrivate, .file, .filePrivate, .secret, .hugetlb, .hugetlbPrivate: true
        default: false
        }
    }

    /// What its size is a multiple of.
    var granule: UInt64 {
        switch self {
        case .hugetlb, .hugetlbPrivate: 2 << 20
        default: 4096
        }
    }
}

/// Kernel: `PROT_*`.
public struct Rights: OptionSet, Sendable {
    public let rawValue: UInt8
    public init(rawValue: UInt8) { self.rawValue = rawValue }
    public static let read = Rights(rawValue: 1)
    public static let write = Rights(rawValue: 2)
    public static let execute = Rights(rawValue: 4)
}

/// Where mmap's pages come from.
public enum MapSource: Sendable, Equatable {
    case anonymous
    case sharedAnonymous
    /// The object behind a region, from an offset on, shared or private as that region is.
    case object(region: Int, offset: UInt64)
}

/// Kernel: `MADV_*`; the raw value is the number that the call takes.
public enum Advice: UInt64, Sendable, CaseIterable {
    case dontneed = 4
    case free = 8
    case remove = 9
    case mergeable = 12
    case unmergeable = 13
    case hugepage = 14
    case nohugepage = 15
    case cold = 20
    case pageout = 21
    case populateRead = 22
    case populateWrite = 23
    case collapse = 25
    case guardInstall = 102
    case guardRemove = 103

    public var name: String {
        switch self {
        case .populateRead: "populate_read"
        case .populateWrite: "populate_write"
        case .guardInstall: "guard_install"
        case .guardRemove: "guard_remove"
        default: "\(self)"
        }
    }
}

/// An address of the process.
public struct HostPlace: Sendable, Equatable {
    public enum Base: Sendable, Equatable {
        /// Address 0, where nothing is ever mapped.
        case null
        /// 0xffff800000000000: no user address.
        case kernel
        case region(Int)
    }
    public var base: Base
    /// Bytes, added modulo 2^64.
    public var offset: UInt64
    public init(_ base: Base, _ offset: UInt64 = 0) {
        self.base = base
        self.offset = offset
    }

    /// Where regions lie: the same in every executor, far apart, with nothing in between.
    public static let firstRegion: UInt64 = 0x1000_0000_0000
    public static let regionSpacing: UInt64 = 1 << 36
    /// Every address of every region that a script can make.
    public static let regions: Range<UInt64> = firstRegion..<firstRegion * 2
    public static let kernelAddress: UInt64 = 0xffff_8000_0000_0000

    public var address: UInt64 {
        switch base {
        case .null: offset
        case .kernel: Self.kernelAddress &+ offset
        case .region(let number): Self.firstRegion &+ UInt64(number) &* Self.regionSpacing &+ offset
        }
    }
}

/// The same access again and again, each `stride` bytes on.
public struct Repetition: Sendable, Equatable {
    public var count: UInt64
    public var stride: UInt64
    public init(count: UInt64 = 1, stride: UInt64 = 4096) {
        self.count = count
        self.stride = stride
    }
}

/// What KVM_SET_USER_MEMORY_REGION{,2} takes.
public struct Region: Sendable, Equatable {
    public var slot: UInt64
    public var flags: UInt64
    public var guestAddress: UInt64
    public var size: UInt64
    public var userAddress: HostPlace
    public var memfd: Int?
    public var memfdOffset: UInt64
    public init(
        slot: UInt64, flags: UInt64 = 0, guestAddress: UInt64, size: UInt64, userAddress: HostPlace, memfd: Int? = nil,
        memfdOffset: UInt64 = 0
    ) {
        self.slot = slot
        self.flags = flags
        self.guestAddress = guestAddress
        self.size = size
        self.userAddress = userAddress
        self.memfd = memfd
        self.memfdOffset = memfdOffset
    }
}

/// What KVM_CLEAR_DIRTY_LOG takes.
public struct ClearedPages: Sendable, Equatable {
    public enum Bits: Sendable, Equatable {
        case all
        /// From the first page on; what is not written is zero.
        case words([UInt64])
        /// A null pointer.
        case missing
    }
    public var slot: UInt64
    public var first: UInt64
    public var count: UInt64
    public var bits: Bits
    public init(slot: UInt64, first: UInt64, count: UInt64, bits: Bits) {
        self.slot = slot
        self.first = first
        self.count = count
        self.bits = bits
    }
}

/// What a guest does in one run.
public struct GuestAccess: Sendable, Equatable {
    public enum Kind: String, Sendable, CaseIterable { case read, write, exec }
    public var kind: Kind
    public var address: UInt64
    /// Bytes: 1, 2, 4 or 8; the address is a multiple of it.
    public var size: UInt64
    public var repetition: Repetition
    public var value: UInt64
    /// KVM's instruction emulator does it, not the processor.
    public var emulated: Bool
    public init(
        _ kind: Kind, _ address: UInt64, size: UInt64 = 8, _ repetition: Repetition = Repetition(), value: UInt64 = 0,
        emulated: Bool = false
    ) {
        self.kind = kind
        self.address = address
        self.size = size
        self.repetition = repetition
        self.value = value
        self.emulated = emulated
    }
}
