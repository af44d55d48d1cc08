// HostConformance: the same calls on the model's host and on real processes of this machine's kernel, and where they
// differ.
//
// Everything happens in a window of 64 pages at one address, in up to four processes and with three memfds. After each call
// both sides say what came of it, and what the window looks like from each process. Read `Conformance.swift` next.

import Frames
import HostMemory

/// A call, drawn at random or written by hand. Pages count from the window's first.
public enum HostCall: Sendable, Equatable {
    case map(process: Int, pages: Range<Int>, MappedKind, Protection)
    case unmap(process: Int, pages: Range<Int>)
    case protect(process: Int, pages: Range<Int>, Protection)
    case advise(process: Int, pages: Range<Int>, HostAdvice)
    /// To page `to`, or only longer or shorter.
    case remap(process: Int, pages: Range<Int>, count: Int, to: Int?)
    /// 8 bytes: word `word` (0..<512) of a page.
    case load(process: Int, page: Int, word: Int)
    case store(process: Int, page: Int, word: Int, UInt64)
    case fork(process: Int, child: Int)
    case end(process: Int)
    case truncate(file: Int, bytes: Int)
    case punchHole(file: Int, pages: Range<Int>)
    case readFile(file: Int, page: Int, word: Int)
    case writeFile(file: Int, page: Int, word: Int, UInt64)
    /// Any numbers, mostly such as mean nothing.
    case raw(process: Int, RawCall)
}

/// A call with its arguments as they are passed.
public struct RawCall: Sendable, Equatable {
    public enum Name: String, Sendable { case mmap, munmap, mprotect, madvise, mremap }
    public var name: Name
    public var address: UInt64
    public var length: UInt64
    /// mmap, mprotect: PROT_*; madvise: the advice; mremap: the new length.
    public var argument: UInt64 = 0
    /// mmap, mremap.
    public var flags: UInt64 = 0
    /// mmap: which memfd; nil: -1.
    public var file: Int?
    /// mmap: the offset; mremap: the new address.
    public var last: UInt64 = 0
}

public enum MappedKind: Sendable, Equatable {
    case anonymous
    case anonymousShared
    case file(Int, firstPage: Int, shared: Bool)
    /// The one object of secret memory.
    case secret(firstPage: Int, shared: Bool)
}

public enum HostAdvice: String, Sendable, CaseIterable {
    case dontNeed = "MADV_DONTNEED"
    case hugePage = "MADV_HUGEPAGE"
    case noHugePage = "MADV_NOHUGEPAGE"
    case mergeable = "MADV_MERGEABLE"
    case unmergeable = "MADV_UNMERGEABLE"
    case populateRead = "MADV_POPULATE_READ"
    case populateWrite = "MADV_POPULATE_WRITE"
    case remove = "MADV_REMOVE"
    case cold = "MADV_COLD"
    case pageOut = "MADV_PAGEOUT"
    case free = "MADV_FREE"
    case guardInstall = "MADV_GUARD_INSTALL"
    case guardRemove = "MADV_GUARD_REMOVE"
}

/// What came of a call.
public enum HostAnswer: Sendable, Equatable {
    case done
    case value(UInt64)
    case error(Errno)
    /// An errno that the model has no word for.
    case unknownError(Int32)
    case segmentationFault, busError
    /// A read or write of a file that ended early, after so many bytes.
    case short(Int)
}

/// What a process sees of one page of the window.
public struct PageView: Sendable, Equatable {
    /// The area that it lies in. Kernel: /proc/PID/smaps, the area's range and `VmFlags`.
    public struct Area: Sendable, Equatable {
        public var rights = Protection.none
        public var isShared = false
        public var isAccounted = false
        public var hugePage = false
        public var noHugePage = false
        public var isMergeable = false
        public var isLocked = false
        public var mayHoldGuards = false
        /// The page is the area's first.
        public var isFirst = false
        public init() {}
    }
    /// Nil: not mapped.
    public var area: Area?
    /// Kernel: bits 63, 62, 61, 58 and 56 of /proc/PID/pagemap.
    public var isPresent = false
    public var isSwapped = false
    public var isGuard = false
    public var isFile = false
    public var isExclusive = false
    public init() {}
}

extension HostCall {
    /// The process that does the call; nil where it belongs to none.
    public var process: Int? {
        switch self {
        case .map(let process, _, _, _), .unmap(let process, _), .protect(let process, _, _),
            .advise(let process, _, _), .remap(let process, _, _, _), .load(let process, _, _),
            .store(let process, _, _, _),
            .fork(let process, _), .end(let process), .raw(let process, _):
            process
        case .truncate, .punchHole, .readFile, .writeFile: nil
        }
    }

    /// Whether it can change areas.
    var changesAreas: Bool {
        switch self {
        case .map, .unmap, .protect, .advise, .remap, .fork, .raw: true
        default: false
        }
    }
}

// MARK: Text: a line of a C program for each call.

extension HostCall: CustomStringConvertible {
    public var description: String {
        switch self {
        case .map(let process, let pages, let kind, let protection):
            "p\(process): mmap(\(place(pages)), \(protection.text), \(kind))"
        case .unmap(let process, let pages): "p\(process): munmap(\(place(pages)))"
        case .protect(let process, let pages, let protection):
            "p\(process): mprotect(\(place(pages)), \(protection.text))"
        case .advise(let process, let pages, let advice): "p\(process): madvise(\(place(pages)), \(advice.rawValue))"
        case .remap(let process, let pages, let count, let target):
            "p\(process): mremap(\(place(pages)), \(count) * PAGE"
                + (target.map { ", MREMAP_MAYMOVE|MREMAP_FIXED, page[\($0)])" } ?? ", 0)")
        case .load(let process, let page, let word): "p\(process): page[\(page)][\(word)]"
        case .store(let process, let page, let word, let value):
            "p\(process): page[\(page)][\(word)] = 0x\(String(value, radix: 16))"
        case .fork(let process, let child): "p\(process): p\(child) = fork()"
        case .end(let process): "p\(process): exit()"
        case .raw(let process, let call): "p\(process): \(call)"
        case .truncate(let file, let bytes): "ftruncate(memfd\(file), \(bytes / 4096) * PAGE + \(bytes % 4096))"
        case .punchHole(let file, let pages):
            "fallocate(memfd\(file), FALLOC_FL_PUNCH_HOLE, \(pages.lowerBound) * PAGE, \(pages.count) * PAGE)"
        case .readFile(let file, let page, let word): "pread(memfd\(file), 8, \(page) * PAGE + \(word * 8))"
        case .writeFile(let file, let page, let word, let value):
            "pwrite(memfd\(file), 0x\(String(value, radix: 16)), 8, \(page) * PAGE + \(word * 8))"
        }
    }

    private func place(_ pages: Range<Int>) -> String { "page[\(pages.lowerBound)], \(pages.count) * PAGE" }
}

extension RawCall: CustomStringConvertible {
    public var description: String {
        func hex(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }
        let arguments: [String] =
            switch name {
            case .mmap:
                [hex(address), hex(length), hex(argument), hex(flags), file.map { "memfd\($0)" } ?? "-1", hex(last)]
            case .munmap: [hex(address), hex(length)]
            case .mprotect: [hex(address), hex(length), hex(argument)]
            case .madvise: [hex(address), hex(length), "\(argument)"]
            case .mremap: [hex(address), hex(length), hex(argument), hex(flags), hex(last)]
            }
        return "\(name.rawValue)(\(arguments.joined(separator: ", ")))"
    }
}

extension Protection {
    var text: String {
        let parts = [(read, "PROT_READ"), (write, "PROT_WRITE"), (execute, "PROT_EXEC")].filter(\.0).map(\.1)
        return parts.isEmpty ? "PROT_NONE" : parts.joined(separator: "|")
    }
}

extension MappedKind: CustomStringConvertible {
    public var description: String {
        switch self {
        case .anonymous: "MAP_PRIVATE|MAP_ANONYMOUS"
        case .anonymousShared: "MAP_SHARED|MAP_ANONYMOUS"
        case .file(let file, let first, let shared):
            "\(shared ? "MAP_SHARED" : "MAP_PRIVATE"), memfd\(file), \(first) * PAGE"
        case .secret(let first, let shared):
            "\(shared ? "MAP_SHARED" : "MAP_PRIVATE"), memfd_secret, \(first) * PAGE"
        }
    }
}

extension HostAnswer: CustomStringConvertible {
    public var description: String {
        switch self {
        case .done: "0"
        case .value(let value): "0x\(String(value, radix: 16))"
        case .error(let errno): "\(errno)"
        case .unknownError(let number): "errno \(number)"
        case .segmentationFault: "SIGSEGV"
        case .busError: "SIGBUS"
        case .short(let bytes): "\(bytes) bytes"
        }
    }
}

extension PageView.Area: CustomStringConvertible {
    public var description: String {
        var words = [rights.text, isShared ? "shared" : "private"]
        if isAccounted { words.append("accounted") }
        if hugePage { words.append("hugepage") }
        if noHugePage { words.append("nohugepage") }
        if isMergeable { words.append("mergeable") }
        if isLocked { words.append("locked") }
        if mayHoldGuards { words.append("guarded") }
        if isFirst { words.append("first") }
        return words.joined(separator: " ")
    }
}

extension PageView: CustomStringConvertible {
    public var description: String {
        var words = [isPresent ? "present" : "absent"]
        if let area { words.append("\(area)") }
        if isSwapped { words.append("swapped") }
        if isGuard { words.append("guard") }
        if isFile { words.append("file") }
        if isExclusive { words.append("exclusive") }
        return words.joined(separator: " ")
    }
}
