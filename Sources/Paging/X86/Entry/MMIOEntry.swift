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
/// need look for them. The form that hides the address from an L1TF attack is left out.
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
        return mmioForm.value | kept | low | high | frame.address.value
    }

    /// Kernel: `get_mmio_spte_generation`.
    public static func generation(ofMMIO entry: UInt64) -> UInt64 { entry >> 3 & 0xff | (entry >> 52 & 0x7ff) << 8 }

    /// Kernel: `get_mmio_spte_gfn`.
    public func frame(ofMMIO entry: UInt64) -> GuestFrame {
        GuestFrame((entry & Self.frameMask & ~(isEPT ? 0 : 1 << 51)) >> 12)
    }

    /// Kernel: `get_mmio_spte_access`.
    public func access(ofMMIO entry: UInt64) -> Rights { isEPT ? [] : Rights(rawValue: UInt8(entry & 6)) }
}
