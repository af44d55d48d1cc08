import Frames
import GuestMemory
import HostMemory

func take(_ vm: VirtualMachine, _ frame: GuestFrame) -> PageReference? {
    vm.page(of: frame)
}
