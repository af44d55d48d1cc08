import Audit
import Frames
import HostMemory

/// Records that hardware set A or D in a leaf: `guest` the leaf's first guest frame (none for a
/// linear address, which has none that hardware knows), `frame` its first host frame,
/// `value` the new entry, `extra` the old one. Table entries' A bits are not recorded: they say nothing about a page.
func recordFlags(
    in memory: PhysicalMemory, address: GuestAddress?, leaf: HostFrame, level: PageLevel, old: UInt64, new: UInt64,
    accessed: UInt64, dirty: UInt64, vcpu: UInt8
) {
    guard let journal = memory.journal else { return }
    let guest = address.map { $0.frame.aligned(to: level).number } ?? Event.none
    let added = new & ~old
    if added & accessed != 0 {
        journal.record(
            Event(
                .hardwareAccessed, frame: leaf, guest: guest, level: level.rawValue, value: new, extra: old, task: vcpu)
        )
    }
    if added & dirty != 0 {
        journal.record(
            Event(.hardwareDirty, frame: leaf, guest: guest, level: level.rawValue, value: new, extra: old, task: vcpu))
    }
}
