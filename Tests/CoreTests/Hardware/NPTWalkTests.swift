import Frames
import Hardware
import Testing

@Suite struct X86_1_2_NestedPageTables {
    @Test(arguments: [PagingMode.fourLevel, .fiveLevel])
    func `an access needs U in every entry, whoever makes it`(mode: PagingMode) throws {
        let fixture = LegacyFixture(mode)
        #expect(fixture.nested().walk(GuestAddress(0xabc), .write).translation?.frame == HostFrame(0xd))
        for level in 1...fixture.top {
            fixture.restore()
            fixture[level] &= ~4
            for access in AccessKind.allCases {
                let fault = try #require(fixture.nested().walk(GuestAddress(0xabc), access).violation)
                #expect(fault.reason == .rights && fault.present && fault.rights == .none)
                let code: UInt64 = [0b101, 0b111, 0b10101][Int(access.rawValue)]
                #expect(fixture.nested().errorCode(of: fault) == code | 1 << 32)
                #expect(fixture.nested().errorCode(of: fault, finalTranslation: false) == code | 1 << 33)
            }
        }
    }

    @Test func `W and NX of all entries count, and NX is reserved without EFER.NXE`() throws {
        let fixture = LegacyFixture(.fourLevel)
        for level in 1...4 as ClosedRange<UInt8> {
            fixture.restore()
            fixture[level] &= ~2
            #expect(fixture.nested().walk(GuestAddress(0), .write).violation?.reason == .rights)
            #expect(fixture.nested().walk(GuestAddress(0), .read).translation?.writable == false)
            fixture.restore()
            fixture[level] |= 1 << 63
            #expect(fixture.nested().walk(GuestAddress(0), .execute).violation?.reason == .rights)
            #expect(fixture.nested().walk(GuestAddress(0), .read).translation?.executable == false)
            let host = fixture.nested(noExecute: false)
            let fault = try #require(host.walk(GuestAddress(0), .execute).violation)
            #expect(fault.reason == .reservedBits && host.errorCode(of: fault) == 0b1101 | 1 << 32, "no I/D either")
        }
    }

    /// Bit 51 is what KVM marks MMIO with (Spec: x86 1.5).
    @Test func `KVM's values do what they are for`() throws {
        let fixture = LegacyFixture(.fourLevel)
        fixture[1] = 0xe67 | 0xd000
        #expect(fixture.nested().walk(GuestAddress(0), .write).translation?.writable == true)
        fixture[1] = 0xa25 | 0xd000
        #expect(fixture.nested().walk(GuestAddress(0), .read).translation?.writable == false)
        for absent in [1 << 63, 0x8000_0000_0000_05a0, 0] as [UInt64] {
            fixture[1] = absent
            let fault = try #require(fixture.nested().walk(GuestAddress(0), .write).violation)
            #expect(fault.reason == .absent && !fault.present)
            #expect(fixture.nested().errorCode(of: fault) == 0b110 | 1 << 32)
        }
        fixture[1] = 0x0008_0000_dead_b00f
        let fault = try #require(fixture.nested().walk(GuestAddress(0), .read).violation)
        #expect(fixture.nested().errorCode(of: fault) == 0b1101 | 1 << 32)
        #expect(fault.entry == 0x0008_0000_dead_b00f)
    }

    @Test func `a guest address has the tables' width, and its highest bit is like others`() {
        for mode in [PagingMode.fourLevel, .fiveLevel] {
            let fixture = LegacyFixture(mode)
            let width = 12 + 9 * UInt64(fixture.top)
            for bit in width..<64 {
                let fault = fixture.nested().walk(GuestAddress(1 << bit), .read).violation
                #expect(fault?.reason == .addressWidth && fault?.present == false)
            }
            fixture.set(fixture[fixture.top], at: fixture.location(fixture.top) + 8 * 256)
            #expect(fixture.nested().walk(GuestAddress(1 << (width - 1)), .read).translation != nil)
        }
    }

    @Test(arguments: [PagingMode.bits32, .pae])
    func `hosts of 32 bits and with PAE have nested tables like their own`(mode: PagingMode) throws {
        let fixture = LegacyFixture(mode)
        func walk(_ address: UInt64, _ access: AccessKind = .read) -> WalkResult {
            fixture.nested().walk(GuestAddress(address), access)
        }
        #expect(walk(0xabc, .write).translation?.frame == HostFrame(0xd))
        for bit in 32..<64 as Range<UInt64> {
            let fault = walk(1 << bit).violation
            #expect(fault?.reason == .addressWidth && fault?.present == false)
        }
        fixture.set(fixture[fixture.top], at: fixture.location(fixture.top) + (mode == .pae ? 2 * 8 : 512 * 4))
        #expect(walk(1 << 31).translation?.frame == HostFrame(0xd))
        fixture[1] = fixture[1] & ~0x60
        #expect(walk(0, .write).translation != nil && fixture[1] & 0x60 == 0x60)
        fixture[2] &= ~4
        #expect(walk(0).violation?.reason == .rights)
        fixture[2] = 0x80_00e7
        #expect(walk(0x5008).translation?.frame == HostFrame(0x805))
        fixture[2] |= 1 << (mode == .pae ? 13 : 21)
        #expect(walk(0).violation?.reason == .reservedBits)
    }

    @Test func `a PAE host's pointers are read in each walk, and may be reserved`() throws {
        let fixture = LegacyFixture(.pae)
        let good = fixture[3]
        fixture[3] = 0
        let absent = try #require(fixture.nested().walk(GuestAddress(0), .write).violation)
        #expect(absent.reason == .absent && fixture.nested().errorCode(of: absent) == 1 << 32 | 6)
        for bit in [1, 2, 5, 8, 46, 63] as [UInt64] {
            fixture[3] = good | 1 << bit
            let fault = try #require(fixture.nested().walk(GuestAddress(0), .read).violation)
            #expect(fault.reason == .reservedBits && fixture.nested().errorCode(of: fault) == 1 << 32 | 0xd)
        }
        fixture[3] = good
        #expect(
            fixture.nested().walk(GuestAddress(0), .execute).translation != nil && fixture[3] == good, "it has no A")
    }

    @Test func `large leaves and memory's end`() {
        let fixture = LegacyFixture(.fourLevel)
        fixture[2] = 0x80_00e7
        let large = fixture.nested().walk(GuestAddress(0x5008), .read).translation
        #expect(large?.frame == HostFrame(0x805) && large?.level == .page2M)
        fixture[2] = 0x100_0007
        #expect(fixture.nested().walk(GuestAddress(0), .read).misconfiguration?.reason == .noMemory)
    }
}
