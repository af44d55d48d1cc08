// The snapshot moves into the result of the fault that it was taken for.

import Frames
import GuestMemory

func fault(_ vm: VirtualMachine, _ frame: GuestFrame, _ slot: MemorySlot) {
    let snapshot = vm.snapshot()  // error: 'snapshot' consumed more than once
    let first = vm.faultIn(frame, slot: slot, write: true, snapshot: snapshot)
    let second = vm.faultIn(frame, slot: slot, write: true, snapshot: snapshot)
    _ = consume first
    _ = consume second
}
