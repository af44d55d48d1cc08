// A frame that no fault-in gave comes with no snapshot.

import Frames
import GuestMemory

func invent(
    _ snapshot: consuming InvalidationSnapshot, _ slot: MemorySlot, _ reference: consuming FaultReference
) -> FaultedFrame {
    FaultedFrame(  // error: 'FaultedFrame' initializer is inaccessible
        guestFrame: GuestFrame(1), frame: HostFrame(2), isWritable: true, isCounted: true, isPrivate: false,
        mayBeHuge: false, slotReference: Unmanaged.passUnretained(slot), snapshot: snapshot, reference: reference)
}
