// Patch 43: whoever serves a fault gets the frame with its page and its writability, or nothing.

import Frames
import GuestMemory

func frame(_ vm: VirtualMachine, _ slot: MemorySlot, _ frame: GuestFrame) -> HostFrame? {
    vm.faultIn(frame, slot: slot, write: false, snapshot: vm.snapshot())  // error: cannot convert return expression
}
