import Audit
import Frames
import Hardware
import HostMemory
import Synchrony

/// A page table written by hand, so that no encoder of the core stands between this check and the walker.
private struct Format {
    let levels: UInt8
    /// Entries of the root's two extra index bits: order 2 is four frames.
    let rootOrder: Int
    let table: (HostFrame) -> UInt64
    let leaf: (HostFrame) -> UInt64
    let writable: UInt64
    let dirty: UInt64
}

func walkEPT(_ host: Host, _ checks: inout Checks) {
    let format = Format(
        levels: 4, rootOrder: 0, table: { $0.physicalAddress | 0x8000_0000_0000_0907 },
        leaf: { $0.physicalAddress | 0x8600_0000_0000_0877 }, writable: 2, dirty: 1 << 9)
    walk(host, format, &checks, "EPT") { root in
        .ept(EPTWalker(memory: host.memory, pointer: root.physicalAddress | 0x5e))
    }
}

func walkGStage(_ host: Host, _ checks: inout Checks) {
    let format = Format(
        levels: 3, rootOrder: 2, table: { $0.number << 10 | 1 }, leaf: { $0.number << 10 | 0x1f }, writable: 4,
        dirty: 1 << 7)
    walk(host, format, &checks, "Sv39x4") { root in
        .gStage(GStageWalker(memory: host.memory, hgatp: 8 << 60 | root.number, hardwareAD: true))
    }
}

/// Builds tables for guest frame 3, stores through them, takes the right away, and gives the tables back.
private func walk(
    _ host: Host, _ format: Format, _ checks: inout Checks, _ name: StaticString, stage: (HostFrame) -> StageTwo
) {
    print(name)
    let memory = host.memory
    guard let page = host.reserveFrames(1)?.lowerBound else {
        return checks.expect(false, "a frame can be reserved")
    }
    let free = memory.freeFrames
    guard let tables = buildTables(host, format, page) else { return checks.expect(false, "tables can be allocated") }
    let address = GuestFrame(3).address + 0x18
    let port = GuestPort(stage: stage(tables[0]), buffer: TranslationBuffer(capacity: 8, journal: memory.journal))
    let leaf = memory.entry(3, of: tables[tables.count - 1])

    checks.expect(port.load(address) == .value(0), "a reserved frame reads as zero")
    checks.expect(leaf.load() & format.dirty == 0, "a load sets no D")
    checks.expect(port.store(address, 0x0123_4567_89ab_cdef) == .stored, "a store goes through")
    checks.expect(leaf.load() & format.dirty != 0, "and sets D")
    checks.expect(
        memory.word(at: page.physicalAddress + 0x18).load() == 0x0123_4567_89ab_cdef, "and reaches the frame")

    _ = leaf.fetchAnd(~(format.writable | format.dirty))
    checks.expect(port.store(address, 1) == .stored, "the TLB keeps the old right")
    port.buffer.invalidateAll()
    if case .fault(.violation(let fault)) = port.store(address, 2) {
        checks.expect(fault.reason == .rights, "until the flush; then the store faults")
    } else {
        checks.expect(false, "until the flush; then the store faults")
    }
    checks.expect(port.load(address) == .value(1), "while loads go on")

    for table in tables { host.freeTable(table) }
    checks.expect(memory.freeFrames == free, "every table is given back")
}

/// One table a level, root first, that map guest frame 3 to `page`; nil when memory is used up.
private func buildTables(_ host: Host, _ format: Format, _ page: HostFrame) -> [HostFrame]? {
    var tables: [HostFrame] = []
    for level in 0..<Int(format.levels) {
        guard let table = host.allocateTable(order: level == 0 ? format.rootOrder : 0, fill: 0) else { return nil }
        tables.append(table)
    }
    for i in 1..<tables.count { host.memory.entry(0, of: tables[i - 1]).store(format.table(tables[i])) }
    host.memory.entry(3, of: tables[tables.count - 1]).store(format.leaf(page))
    return tables
}
