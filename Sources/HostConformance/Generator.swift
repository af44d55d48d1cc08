import Frames
import HostMemory
import SeededRandom

/// Draws calls. It follows what is mapped where, so that most calls go where something is; enough go where nothing is.
struct Generator {
    private var random: SplitMix
    private(set) var running: [Bool]
    /// For each process and page.
    private var mapped: [[Bool]]
    private var value: UInt64 = 0

    private let advices: [HostAdvice]
    private let drawsSecrets: Bool

    /// - Parameter impossible: advices that are not to be drawn.
    /// - Parameter secrets: secret memory is.
    init(seed: UInt64, without impossible: [HostAdvice] = [], secrets: Bool = true) {
        drawsSecrets = secrets
        // What goes to the swap device comes back in many ways: forked, moved, freed, read.
        let often: [HostAdvice] = [.pageOut, .pageOut, .pageOut, .free]
        advices = (HostAdvice.allCases + often).filter { !impossible.contains($0) }
        random = SplitMix(seed: seed)
        let others = ModelHost.mostProcesses - 1
        running = [true] + Array(repeating: false, count: others)
        mapped = Array(
            repeating: Array(repeating: false, count: ModelHost.windowPages), count: ModelHost.mostProcesses)
    }

    private mutating func below(_ bound: Int) -> Int { Int.random(in: 0..<bound, using: &random) }
    private mutating func chance(_ of: Int) -> Bool { below(of) == 0 }
    private mutating func pick<T>(_ list: [T]) -> T { list[below(list.count)] }

    private mutating func process() -> Int { pick(running.indices.filter { running[$0] }) }

    /// One that is mapped, but for one in `of` times.
    private mutating func page(_ process: Int, anyOnceIn of: Int) -> Int {
        let there = mapped[process].indices.filter { mapped[process][$0] }
        return there.isEmpty || chance(of) ? below(ModelHost.windowPages) : pick(there)
    }

    private mutating func pages(_ process: Int) -> Range<Int> {
        let first = max(0, page(process, anyOnceIn: 8) - (chance(3) ? below(4) : 0))
        let end = min(first + count(), ModelHost.windowPages)
        // Half of the time without a hole.
        guard chance(2), let hole = (first + 1..<end).first(where: { !mapped[process][$0] }) else {
            return first..<end
        }
        return first..<hole
    }

    private mutating func count() -> Int { pick([1, 1, 1, 2, 2, 3, 4, 8, 20]) }

    private mutating func protection() -> Protection {
        pick([
            .readWrite, .readWrite, .readWrite, .readWrite, .read, .read, .none, Protection(write: true), .readExecute,
        ])
    }

    private mutating func kind() -> MappedKind {
        switch below(16) {
        case 0...5: .anonymous
        case 6, 7: .anonymousShared
        // Mostly shared, for nothing else is allowed.
        case 8 where drawsSecrets: .secret(firstPage: below(18), shared: !chance(6))
        case 8...11: .file(below(ModelHost.mostFiles), firstPage: below(12), shared: true)
        default: .file(below(ModelHost.mostFiles), firstPage: below(12), shared: false)
        }
    }

    /// Words at the ends of the page and in it.
    private mutating func word() -> Int { pick([0, 0, 1, 77, 511]) }

    private mutating func newValue() -> UInt64 {
        value += 1
        return value
    }

    mutating func next() -> HostCall {
        let process = process()
        switch below(100) {
        case 0..<14: return map(process)
        case 14..<18:
            let pages = pages(process)
            for page in pages { mapped[process][page] = false }
            return .unmap(process: process, pages: pages)
        case 18..<28: return .protect(process: process, pages: pages(process), protection())
        case 28..<30: return remap(process)
        case 30..<38: return .advise(process: process, pages: pages(process), pick(advices))
        case 38..<56: return .load(process: process, page: page(process, anyOnceIn: 20), word: word())
        case 56..<80: return .store(process: process, page: page(process, anyOnceIn: 20), word: word(), newValue())
        case 80..<82: return raw(process)
        case 82..<85: return fork(process) ?? next()
        case 85..<87: return end(process) ?? next()
        default: return fileCall()
        }
    }

    /// Where there is room, but for a few.
    private mutating func map(_ process: Int) -> HostCall {
        var pages = pages(process)
        for _ in 0..<10 where !chance(5) {
            let first = below(ModelHost.windowPages)
            pages = first..<min(first + count(), ModelHost.windowPages)
            if !pages.contains(where: { mapped[process][$0] }) { break }
        }
        if !pages.contains(where: { mapped[process][$0] }) {
            for page in pages { mapped[process][page] = true }
        }
        return .map(process: process, pages: pages, kind(), protection())
    }

    private mutating func remap(_ process: Int) -> HostCall {
        let pages = pages(process)
        let room = ModelHost.windowPages - pages.lowerBound
        let count = chance(2) ? pages.count : max(1, min(room, pages.count + below(7) - 3))
        guard chance(2) else {
            for page in pages.lowerBound..<pages.lowerBound + count where count > pages.count {
                mapped[process][page] = true
            }
            return .remap(process: process, pages: pages, count: count, to: nil)
        }
        let target = below(ModelHost.windowPages - count + 1)
        for page in 0..<count { mapped[process][target + page] = true }
        return .remap(process: process, pages: pages, count: count, to: target)
    }

    // MARK: Any numbers

    /// A call that would mean something, but for one argument. None reaches past the window that could do something there.
    private mutating func raw(_ process: Int) -> HostCall {
        let pages = pages(process)
        let address = ModelHost.base.value + UInt64(pages.lowerBound) * pageSize
        let length = UInt64(pages.count) * pageSize
        var call: RawCall
        switch below(5) {
        case 0:
            call = RawCall(name: .mmap, address: address, length: length)
            call.argument = rights()
            call.flags = pick([0x10_0022, 0x10_0021, 0x10_0002, 0x10_0001, 0x10_0003, 0x32, 0x31, 0x12, 0x11])
            if call.flags & 0x20 == 0 { call.file = below(ModelHost.mostFiles) }
            switch below(5) {
            case 0: call.last = pick([1, 4095, 0xffff_ffff_ffff_f000, 0x7fff_ffff_ffff_f000, 3 * pageSize])
            case 1: call.flags = call.flags & ~0xf | pick([0, 4, 15, 3])
            case 2: call.file = nil
            case 3: call.length = oddLength(length)
            default: call.address = oddAddress(address)
            }
        case 1:
            call = RawCall(name: .munmap, address: address, length: length)
            if chance(2) { call.address = oddAddress(address) } else { call.length = oddLength(length) }
        case 2:
            call = RawCall(name: .mprotect, address: address, length: length, argument: rights())
            switch below(3) {
            case 0: call.address = oddAddress(address)
            case 1: call.length = oddLength(length)
            default: call.argument |= pick([8, 0x10, 0x80, 0x0100_0000, 0x0200_0000, 0x0300_0000, 1 << 31])
            }
        case 3:
            call = RawCall(name: .madvise, address: address, length: length, argument: pick([4, 8, 15, 20, 22, 23]))
            switch below(3) {
            case 0: call.address = oddAddress(address)
            case 1: call.length = oddLength(length)
            default: call.argument = pick([5, 6, 7, 26, 99, 104, 1 << 20])
            }
        default:
            call = RawCall(name: .mremap, address: address, length: length, argument: length)
            if chance(2) {
                call.flags = 3
                call.last = ModelHost.base.value + UInt64(below(ModelHost.windowPages - pages.count + 1)) * pageSize
            }
            switch below(5) {
            case 0: call.address = oddAddress(address)
            case 1: call.length = pick([length - 1, length - 4095, UInt64.max - 4095, 1 << 47])
            case 2: call.argument = pick([0, 1 << 47, UInt64.max, UInt64.max - 4095])
            case 3: call.flags = pick([2, 8, 9, 16])
            default: call.last = oddAddress(call.last)
            }
        }
        return .raw(process: process, call)
    }

    /// PROT_*, but for execute alone, which needs protection keys.
    private mutating func rights() -> UInt64 { pick([0, 1, 2, 3, 5, 6, 7]) }

    private mutating func oddAddress(_ address: UInt64) -> UInt64 {
        pick([address + 1, address + 8, address + 4095, 0x7fff_ffff_f000, 0x7fff_ffff_e000, 1 << 47, 1 << 63, ~0xfff])
    }

    /// Too short by a part of a page, none, or more than there is.
    private mutating func oddLength(_ length: UInt64) -> UInt64 {
        pick([length - 1, length - 4095, 0, UInt64.max, UInt64.max - 4094, UInt64.max - 4095])
    }

    private mutating func fileCall() -> HostCall {
        let file = below(ModelHost.mostFiles)
        switch below(12) {
        case 0..<5:
            let inside = chance(2) ? 0 : pick([1, 8, 77 * 8, 77 * 8 + 3, 4088, 4095])
            return .truncate(file: file, bytes: below(16) * Int(pageSize) + inside)
        case 5, 6:
            let first = below(14)
            return .punchHole(file: file, pages: first..<first + 1 + below(6))
        case 7, 8: return .readFile(file: file, page: below(16), word: word())
        default: return .writeFile(file: file, page: below(16), word: word(), newValue())
        }
    }

    private mutating func fork(_ parent: Int) -> HostCall? {
        guard let child = running.firstIndex(of: false) else { return nil }
        running[child] = true
        mapped[child] = mapped[parent]
        return .fork(process: parent, child: child)
    }

    private mutating func end(_ process: Int) -> HostCall? {
        guard running.filter({ $0 }).count > 1 else { return nil }
        running[process] = false
        return .end(process: process)
    }
}
