import Frames
import GuestMemory

func map(_ vm: VirtualMachine, _ frame: GuestFrame) throws(Errno) {
    try vm.map(frame).unmap()
}
