import Frames
import GuestMemory

func translate(_ vm: VirtualMachine, _ slot: MemorySlot) -> FaultInResult {
    vm.faultIn(GuestFrame(1), slot: slot, write: true, snapshot: vm.snapshot())
}
