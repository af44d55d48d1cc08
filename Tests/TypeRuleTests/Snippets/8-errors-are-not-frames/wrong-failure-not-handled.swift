// Each way out of a fault-in is taken care of.

import Frames
import GuestMemory

func fault(_ vm: VirtualMachine, _ frame: GuestFrame, _ slot: MemorySlot) {
    switch vm.faultIn(frame, slot: slot, write: true, snapshot: vm.snapshot()) {  // error: switch must be exhaustive
    case .frame(let faulted): faulted.releaseUnused()
    }
}
