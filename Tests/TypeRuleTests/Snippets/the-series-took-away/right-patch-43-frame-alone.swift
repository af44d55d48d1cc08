import Frames
import GuestMemory

func frame(_ vm: VirtualMachine, _ slot: MemorySlot, _ frame: GuestFrame) -> HostFrame? {
    switch vm.faultIn(frame, slot: slot, write: false, snapshot: vm.snapshot()) {
    case .failed: return nil
    case .frame(let faulted):
        let found = faulted.frame
        faulted.releaseUnused()
        return found
    }
}
