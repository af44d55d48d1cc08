// A snapshot proves that the count was read; a number proves nothing.

import Frames
import GuestMemory

func fault(_ vm: VirtualMachine, _ frame: GuestFrame, _ slot: MemorySlot) -> FaultInResult {
    let snapshot = InvalidationSnapshot(7, vm)  // error: 'InvalidationSnapshot' initializer is inaccessible
    return vm.faultIn(frame, slot: slot, write: true, snapshot: snapshot)
}
