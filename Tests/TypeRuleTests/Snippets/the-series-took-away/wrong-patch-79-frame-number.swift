// Patch 79: no way leads from a guest frame to a bare frame number.

import Frames
import GuestMemory

func frame(_ vm: VirtualMachine, _ frame: GuestFrame) -> HostFrame? {
    vm.hostFrame(of: frame)  // error: value of type 'VirtualMachine' has no member 'hostFrame'
}
