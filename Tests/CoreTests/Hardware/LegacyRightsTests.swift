import Frames
import Hardware
import Testing

/// One case of access rights, decided sentence by sentence as the manual does: Intel SDM volume 3, "Determination of
/// access rights" and "Protection keys".
private struct ManualAccess {
    enum Kind { case read, write, fetch }
    var kind: Kind
    var userMode: Bool
    var implicit: Bool
    /// Of each entry that is used, from the top: U/S, R/W, XD.
    var entries: [(us: Bool, rw: Bool, xd: Bool)]
    var wp, smep, smap, nxe, ac: Bool
    /// CR4.PKE with the two bits of the page's key.
    var pke, ad, wd: Bool

    var userAddress: Bool { entries.allSatisfy { $0.us } }
    var allWritable: Bool { entries.allSatisfy { $0.rw } }
    var noneDisabled: Bool { entries.allSatisfy { !$0.xd } }

    /// "Protection keys control only data accesses to user-mode addresses."
    var keyPermits: Bool {
        guard pke, userAddress, kind != .fetch else { return true }
        if ad { return false }
        if kind == .write, wd, userMode || wp { return false }
        return true
    }

    var permitted: Bool { userMode ? userPermitted : supervisorPermitted }

    private var supervisorPermitted: Bool {
        switch (kind, userAddress) {
        case (.read, false): return true
        case (.read, true): return smapPermits && keyPermits
        case (.write, false): return wp ? allWritable : true
        case (.write, true): return smapPermits && keyPermits && (wp ? allWritable : true)
        case (.fetch, false): return nxe ? noneDisabled : true
        case (.fetch, true): return smep ? false : nxe ? noneDisabled : true
        }
    }

    /// "If CR4.SMAP = 1, access rights depend on EFLAGS.AC and on whether the access is implicit or explicit."
    private var smapPermits: Bool { !smap || (ac && !implicit) }

    private var userPermitted: Bool {
        guard userAddress else { return false }
        switch kind {
        case .read: return keyPermits
        case .write: return allWritable && keyPermits
        case .fetch: return nxe ? noneDisabled : true
        }
    }

    /// Of a fault on a present entry without reserved bits.
    var errorCode: UInt32 {
        var code: UInt32 = 1
        if kind == .write { code |= 2 }
        if userMode { code |= 4 }
        if kind == .fetch, smep || nxe { code |= 16 }
        if !keyPermits { code |= 32 }
        return code
    }
}

@Suite struct X86_4_6_AccessRights {
    /// Two entries of the path vary (the top one and the leaf), the registers and the access in every combination.
    @Test(arguments: PagingMode.translating, [false, true])
    func `every combination of rights and registers does what the manual says`(mode: PagingMode, large: Bool) {
        let fixture = LegacyFixture(mode)
        let hasKeys = mode.isLong
        let leafLevel: UInt8 = large ? 2 : 1
        // With 32-bit paging a large leaf is the only entry; with PAE the pointers have no rights.
        let upper: UInt8? = fixture.top == leafLevel || (mode == .pae && large) ? nil : mode == .pae ? 2 : fixture.top
        let settings: UInt32 = hasKeys ? 0x400 : 0x80
        for setting in 0..<settings {
            let nxe = setting & 8 != 0 && mode != .bits32
            for bits in 0..<(upper == nil ? 8 : 64 as UInt64) {
                if !nxe, bits & 0b100100 != 0 { continue }
                let entries = [bits & 7, bits >> 3 & 7].prefix(upper == nil ? 1 : 2)
                fixture.restore()
                let leaf = LegacyFixture.leaf | (large ? 0x80 : LegacyFixture.page)
                fixture[leafLevel] = rights(leaf, bits & 7) | (hasKeys ? 11 << 59 : 0)
                if let upper { fixture[upper] = rights(fixture[upper], bits >> 3 & 7) }
                check(fixture, setting, nxe, entries.map { ($0 & 1 != 0, $0 & 2 != 0, $0 & 4 != 0) }, large)
            }
        }
    }

    /// 1 U/S, 2 R/W, 4 XD.
    private func rights(_ entry: UInt64, _ bits: UInt64) -> UInt64 {
        entry & ~6 | (bits & 1) << 2 | (bits & 2) | (bits & 4) << 61
    }

    private func check(
        _ fixture: LegacyFixture, _ setting: UInt32, _ nxe: Bool, _ entries: [(us: Bool, rw: Bool, xd: Bool)],
        _ large: Bool
    ) {
        func bit(_ n: UInt32) -> Bool { setting >> n & 1 != 0 }
        for kind in [ManualAccess.Kind.read, .write, .fetch] {
            let implicit = bit(6) && kind != .fetch
            let manual = ManualAccess(
                kind: kind, userMode: bit(5) && !implicit, implicit: implicit, entries: entries, wp: bit(0),
                smep: bit(1), smap: bit(2), nxe: nxe, ac: bit(4), pke: bit(7), ad: bit(8), wd: bit(9))
            // CPL 1 and 2 are as 0.
            var registers = fixture.registers(noExecute: bit(3), cpl: bit(5) ? 3 : UInt8(setting % 3))
            if !bit(0) { registers.cr0 &= ~(1 << 16) }
            if bit(1) { registers.cr4 |= 1 << 20 }
            if bit(2) { registers.cr4 |= 1 << 21 }
            if bit(7) { registers.cr4 |= 1 << 22 }
            registers.alignmentCheck = bit(4)
            // Only the page's key matters: the others' bits are the opposite.
            let key = (bit(8) ? 1 : 0 as UInt32) | (bit(9) ? 2 : 0)
            registers.pkru = (key ^ 3) &* 0x5555_5555 & ~(3 << 22) | key << 22
            let access: AccessKind = kind == .read ? .read : kind == .write ? .write : .execute
            let result = fixture.walker(registers).walk(0xabc, LinearAccess(access, implicit: implicit))
            let isRight =
                manual.permitted
                ? result.translation?.frame == HostFrame(large ? 0 : 0xd)
                : result.pageFault?.errorCode == manual.errorCode && result.pageFault?.reason == .rights
            if !isRight { Issue.record("\(fixture.mode) large \(large) \(manual): \(result)") }
        }
    }

    @Test func `rights are those of all entries of the path`() {
        let fixture = LegacyFixture(.fiveLevel)
        for level in 1...5 as ClosedRange<UInt8> {
            for (bit, access) in [(1, LinearAccess.write), (2, .read), (63, .execute)] as [(UInt64, LinearAccess)] {
                fixture.restore()
                fixture[level] ^= 1 << bit
                let fault = fixture.walker().walk(0, access).pageFault
                #expect(fault?.reason == .rights && fault?.level == .page4K, "level \(level) bit \(bit)")
            }
        }
    }

    @Test func `I/D is reported only where fetches can be refused, also for pages that are not there`() {
        let fixture = LegacyFixture(.fourLevel)
        fixture[1] = 0
        for (noExecute, smep) in [(false, false), (true, false), (false, true), (true, true)] {
            var registers = fixture.registers(noExecute: noExecute, cpl: 0)
            if smep { registers.cr4 |= 1 << 20 }
            let code = fixture.walker(registers).walk(0, .execute).pageFault?.errorCode
            #expect(code == (noExecute || smep ? 16 : 0))
        }
        let narrow = LegacyFixture(.bits32)
        narrow[1] = 0
        #expect(narrow.walker().walk(0, .execute).pageFault?.errorCode == 4, "NXE is nothing without CR4.PAE")
    }
}
