import Frames
import GuestMemory

func fault(_ vm: VirtualMachine, _ frame: GuestFrame, _ slot: MemorySlot) -> FaultInResult {
    let snapshot = vm.snapshot()
    return vm.faultIn(frame, slot: slot, write: true, snapshot: snapshot)
}
