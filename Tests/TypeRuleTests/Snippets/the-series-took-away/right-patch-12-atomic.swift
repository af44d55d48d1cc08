import Frames
import GuestMemory

func look(_ vm: VirtualMachine, _ frame: GuestFrame) {
    _ = vm.faultIn(frame, slot: nil, write: false, snapshot: vm.snapshot())
}
