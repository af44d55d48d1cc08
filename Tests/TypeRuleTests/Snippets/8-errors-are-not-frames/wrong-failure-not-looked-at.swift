// A result is not a frame until one has looked.

import Frames
import GuestMemory

func fault(_ vm: VirtualMachine, _ frame: GuestFrame, _ slot: MemorySlot) {
    let result = vm.faultIn(frame, slot: slot, write: true, snapshot: vm.snapshot())
    result.releaseUnused()  // error: value of type 'FaultInResult' has no member 'releaseUnused'
}
