import Frames
import GuestMemory

func fault(_ vm: VirtualMachine, _ frame: GuestFrame, _ slot: MemorySlot) {
    let snapshot = vm.snapshot()
    switch vm.faultIn(frame, slot: slot, write: true, snapshot: snapshot) {
    case .frame(let faulted): faulted.releaseUnused()
    case .failed(_, let again): _ = vm.faultIn(frame, slot: slot, write: false, snapshot: again)
    }
}
