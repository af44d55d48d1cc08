// Without a snapshot nobody could tell that an invalidation came between (I-8).

import Frames
import GuestMemory

func fault(_ vm: VirtualMachine, _ frame: GuestFrame, _ slot: MemorySlot) -> FaultInResult {
    vm.faultIn(frame, slot: slot, write: true)  // error: missing argument for parameter 'snapshot' in call
}
