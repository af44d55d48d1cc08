import Frames
import GuestMemory

/// Entries that say "there is no memory here, emulate": hardware faults on them in a way of its own, so that the exit
/// needs no lookup. Kernel: `make_mmio_spte`. Spec: x86 1.5.
///
///     EPT      2:0 = 110, which is a misconfiguration; 63 clear
///     legacy   51 and 0 set: a present entry with a reserved bit; 2:1 keep U and W
///     both     10:3 and 62:52 the generation, 51:12 the guest's address; bit 11 clear (Spec: X18)
///
/// The generation is that of the slots when the entry was made: once they change, all such entries are stale, and nobody
/// need look for them.
///
/// On processors with the L1TF flaw, which speculate through entries that are not present, the five highest address bits
/// that their cache knows are all set (`unreachable`), and the guest's address has its own five bits to the left of them.
extension EntryBits {
    /// Entries keep 19 bits of the slots' generation. Kernel: `MMIO_SPTE_GEN_MASK`.
    public static let generationMask: UInt64 = (1 << 19) - 1

    /// What every MMIO entry has, and nothing else may. Kernel: `shadow_mmio_mask`, `shadow_mmio_value`.
    public var mmioForm: MarkerForm {
        isEPT ? MarkerForm(mask: Self.empty | 7, value: 6) : MarkerForm(mask: 1 << 51 | 1, value: 1 << 51 | 1)
    }

    /// Kernel: `is_mmio_spte`, but for the question whether there are any.
    @inline(__always)
    public func isMMIO(_ entry: UInt64) -> Bool { mmioForm.matches(entry) }

    /// - Parameter generation: the slots', of which 19 bits are kept. Bit 63, an update in progress, is not among them.
    public func mmioEntry(_ frame: GuestFrame, generation: UInt64, _ access: Rights) -> UInt64 {
        let kept = isEPT ? 0 : UInt64(access.rawValue) & 6
        let low = (generation & 0xff) << 3
        let high = (generation >> 8 & 0x7ff) << 52
        let address = frame.address.value
        let place = unreachable | address & ~unreachable | (address & unreachable) << Self.hiddenBits
        return mmioForm.value | kept | low | high | place
    }

    /// Kernel: `get_mmio_spte_generation`.
    public static func generation(ofMMIO entry: UInt64) -> UInt64 { entry >> 3 & 0xff | (entry >> 52 & 0x7ff) << 8 }

    /// Kernel: `get_mmio_spte_gfn`.
    public func frame(ofMMIO entry: UInt64) -> GuestFrame {
        guard unreachable != 0 else { return GuestFrame((entry & Self.frameMask & ~(isEPT ? 0 : 1 << 51)) >> 12) }
        let low = entry & Self.frameMask & (unreachable & (0 &- unreachable) - 1)
        return GuestFrame((low | entry >> Self.hiddenBits & unreachable) >> 12)
    }

    /// Kernel: `SHADOW_NONPRESENT_OR_RSVD_MASK_LEN`.
    private static let hiddenBits: UInt64 = 5

    /// The five highest of as many address bits as the first-level cache has. Kernel: `kvm_mmu_reset_all_pte_masks`.
    static func unreachable(cacheAddressBits: UInt64) -> UInt64 {
        cacheAddressBits == 0 ? 0 : (1 << hiddenBits - 1) << (cacheAddressBits - hiddenBits)
    }

    /// Kernel: `get_mmio_spte_access`.
    public func access(ofMMIO entry: UInt64) -> Rights { isEPT ? [] : Rights(rawValue: UInt8(entry & 6)) }
}
