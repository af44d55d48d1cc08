// WalkFuzz: the processor's walks over random tables, and what must hold whatever stands in them: no crash, nothing read or
// written outside of what the walk may see, no more loads than the architecture has levels. Everything is a function of
// the seed. Read this file first, then `RandomTables.swift` for what is in memory.

import Frames
import Hardware
import HostMemory
import Machine
import SeededRandom

/// What random walks came to.
public struct RandomWalkReport: Sendable, Equatable {
    public let seed: UInt64
    public var walks = 0
    public var translated = 0
    public var pageFaults = 0
    public var nonCanonical = 0
    public var outside = 0
    /// EPT violations and nested page faults, also those of second-stage walks alone.
    public var stageTwoFaults = 0
    public var misconfigurations = 0
    public var fullLogs = 0
    /// The longest walks, in entries read: of one stage, and of two.
    public var mostLoads = 0
    public var mostLoadsOfTwoStages = 0
    /// What must not be, the first ten: each with the walk's number.
    public var failures: [String] = []

    init(seed: UInt64) { self.seed = seed }

    mutating func count(_ result: WalkResult) {
        switch result {
        case .translated: translated += 1
        case .violation: stageTwoFaults += 1
        case .misconfiguration: misconfigurations += 1
        case .modificationLogFull: fullLogs += 1
        }
    }

    mutating func count(_ result: LinearResult) {
        switch result {
        case .translated: translated += 1
        case .pageFault: pageFaults += 1
        case .nonCanonical: nonCanonical += 1
        case .outside: outside += 1
        case .stageTwo(let fault): count(fault.result)
        }
    }
}

/// Walks random tables `count` times, in all modes, alone and behind EPT and NPT. The second stage is random, too, or a
/// sound one, out of which nothing may escape. Nil when this machine does not give 4 MiB of memory.
public func walkRandomTables(count: Int, seed: UInt64) -> RandomWalkReport? {
    guard let tables = RandomTables(seed: seed) else { return nil }
    var fuzz = WalkFuzz(tables: tables, seed: seed)
    fuzz.run(count)
    return fuzz.report
}

private struct WalkFuzz {
    let tables: RandomTables
    var random: SplitMix
    var report: RandomWalkReport
    let log: ModificationLog
    static let walksPerRound = 256

    init(tables: RandomTables, seed: UInt64) {
        self.tables = tables
        random = SplitMix(seed: seed ^ 0x7761_6c6b)
        report = RandomWalkReport(seed: seed)
        log = ModificationLog(memory: tables.memory, frame: RandomTables.logFrame)
    }

    mutating func run(_ count: Int) {
        while report.walks < count {
            tables.renew()
            for _ in 0..<min(Self.walksPerRound, count - report.walks) { walkOnce() }
        }
    }

    private mutating func walkOnce() {
        defer { report.walks += 1 }
        if log.isFull, random.next() % 64 == 0 { log.reset() }
        let access = AccessKind(rawValue: UInt8(random.next() % 3)) ?? .read
        switch tables.setup {
        case .alone: walkLinear(.physical(tables.memory), access)
        case .behind(let isSound):
            let stage = makeStage()
            // Now and then the second stage on its own, with any guest address.
            if random.next() % 8 == 0 {
                walkStage(stage, access, isSound)
            } else {
                walkLinear(.guest(stage), access)
            }
        }
    }

    private mutating func walkLinear(_ memory: TableMemory, _ access: AccessKind) {
        let registers = makeRegisters()
        let processor = makeProcessor()
        let walker = LegacyWalker(tables: memory, registers: registers, processor: processor)
        let address = makeAddress(walker.mode)
        let implicit = random.next() % 8 == 0 && access != .execute
        let watch = WalkWatch(tables)
        let result = watch.during { walker.walk(address, LinearAccess(access, implicit: implicit)) }
        report.count(result)
        judge(watch, limit: WalkLimit(walker.mode, memory))
        guard case .translated(let page) = result else { return }
        judge(page.frame, access)
    }

    private mutating func walkStage(_ stage: StageTwo, _ access: AccessKind, _ isSound: Bool) {
        let address = GuestAddress(
            random.next() >> (random.next() % 8 == 0 ? random.next() % 64 : 16 + random.next() % 40))
        let watch = WalkWatch(tables)
        let result = watch.during { stage.walk(address, access) }
        report.count(result)
        judge(watch, limit: WalkLimit(stage))
        guard case .translated(let page) = result else { return }
        judge(page.frame, access)
    }

    private mutating func judge(_ watch: WalkWatch, limit: WalkLimit) {
        if limit.hasTwoStages {
            report.mostLoadsOfTwoStages = max(report.mostLoadsOfTwoStages, watch.loads)
        } else {
            report.mostLoads = max(report.mostLoads, watch.loads)
        }
        if watch.loads > limit.loads { fail("\(watch.loads) loads where \(limit.loads) are possible") }
        if let frame = watch.strayRead { fail("reads an entry in frame \(frame)") }
        if let frame = watch.strayWrite { fail("writes an entry in frame \(frame)") }
    }

    private mutating func judge(_ frame: HostFrame, _ access: AccessKind) {
        let isAllowed = access == .write ? tables.mayWrite(frame) : tables.mayRead(frame)
        if !isAllowed { fail("a page at frame \(frame.number)") }
    }

    private mutating func fail(_ what: String) {
        guard report.failures.count < 10 else { return }
        report.failures.append("walk \(report.walks): \(what)")
    }

    // MARK: Processors

    private mutating func makeRegisters() -> PagingRegisters {
        var bits = random.next()
        func next(_ probability: UInt64 = 2) -> Bool {
            defer { bits = bits >> 3 | bits << 61 }
            return bits % 8 < 8 / probability * (probability - 1)
        }
        var registers = PagingRegisters(cr0: 0, cr3: tables.root(), cr4: 0, efer: 0)
        if next(8) { registers.cr0 |= PagingRegisters.pagingBit }
        if next() { registers.cr0 |= PagingRegisters.writeProtectBit }
        if next() { registers.cr4 |= PagingRegisters.largePagesBit }
        if next(4) { registers.cr4 |= PagingRegisters.physicalAddressExtensionBit }
        if next() { registers.cr4 |= PagingRegisters.fiveLevelsBit }
        if next() { registers.cr4 |= PagingRegisters.supervisorExecutionPreventionBit }
        if next() { registers.cr4 |= PagingRegisters.supervisorAccessPreventionBit }
        if next() { registers.cr4 |= PagingRegisters.protectionKeysBit }
        if next(4) { registers.efer |= PagingRegisters.longModeBit }
        if next(4) { registers.efer |= PagingRegisters.noExecuteBit }
        registers.alignmentCheck = next()
        registers.privilegeLevel = next() ? 3 : 0
        registers.pkru = UInt32(truncatingIfNeeded: random.next() & random.next() & random.next())
        func pointer(_ root: UInt64) -> UInt64 { root & ~0xfff | (next(8) ? 1 : 0) }
        registers.pointers = PageDirectoryPointers(
            pointer(tables.root()), pointer(tables.root()), pointer(tables.root()), pointer(tables.root()))
        return registers
    }

    private mutating func makeProcessor() -> PagingProcessor {
        let widths = [32, 36, 39, 40, 46, 48, 52]
        let bits = random.next()
        return PagingProcessor(
            physicalAddressBits: widths[Int(bits % 7)], gigabytePages: bits >> 8 & 3 != 0, isAMD: bits >> 10 & 1 != 0)
    }

    /// Mostly canonical.
    private mutating func makeAddress(_ mode: PagingMode) -> UInt64 {
        let address = random.next()
        guard mode.isLong, random.next() % 16 != 0 else { return address }
        let unused = 64 - (12 + 9 * UInt64(mode.topLevel))
        return UInt64(bitPattern: Int64(bitPattern: address << unused) >> Int64(unused))
    }

    private mutating func makeStage() -> StageTwo {
        let bits = random.next()
        let root = tables.stageRoot(fiveLevels: bits & 1 != 0)
        guard tables.isEPT else {
            // A sound second stage has entries of 64-bit tables.
            let isOld = tables.setup != .behind(sound: true) && bits >> 9 & 3 == 0
            let modes: [PagingMode] = isOld ? [.bits32, .pae] : [.fourLevel, .fiveLevel]
            return .npt(
                NPTWalker(
                    memory: tables.memory, root: root, mode: modes[Int(bits & 1)], noExecute: bits & 6 != 0,
                    processor: makeProcessor()))
        }
        let accessDirty = bits & 8 != 0
        var pointer = root | 6 | (bits & 1 != 0 ? 4 << 3 : 3 << 3) | (accessDirty ? 0x40 : 0)
        // A sound second stage has a sound root.
        if tables.setup != .behind(sound: true), bits >> 8 & 0xff == 0 { pointer ^= 1 << (bits >> 16 & 63) }
        return .ept(
            EPTWalker(
                memory: tables.memory, pointer: pointer, physicalAddressBits: makeProcessor().physicalAddressBits,
                executeOnly: bits & 0x10 != 0, largestLeaf: bits & 0x60 == 0 ? .page2M : .page1G,
                log: bits & 0x80 != 0 ? log : nil))
    }
}

/// The most entries that one walk can read.
private struct WalkLimit {
    let loads: Int
    let hasTwoStages: Bool

    /// A stage alone: one entry a level.
    init(_ stage: StageTwo) {
        loads = Self.levels(of: stage)
        hasTwoStages = false
    }

    /// In two dimensions each of the guest's entries costs a walk and a load, and the page a walk more. Where EPT keeps no
    /// flags, a table turns out to be read-only only when A must be set, which costs one walk more, and the last.
    init(_ mode: PagingMode, _ memory: TableMemory) {
        switch memory {
        case .physical:
            loads = mode == .pae ? 2 : Int(mode.topLevel)
            hasTwoStages = false
        case .guest(let stage):
            let second = Self.levels(of: stage)
            var first = Int(mode.topLevel)
            var again = 0
            if case .ept(let walker) = stage {
                if mode == .pae { first -= 1 }
                if !walker.accessDirty { again = second }
            }
            loads = first * (second + 1) + max(second, again)
            hasTwoStages = true
        }
    }

    private static func levels(of stage: StageTwo) -> Int {
        switch stage {
        case .ept(let walker): Int(walker.rootLevel.rawValue)
        case .npt(let walker): Int(walker.rootLevel.rawValue)
        case .gStage: 0
        }
    }
}
