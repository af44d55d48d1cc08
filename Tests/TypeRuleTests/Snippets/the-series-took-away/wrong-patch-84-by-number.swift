// Patch 84: a page is not put or marked by its number.

import Frames
import GuestMemory

func finish(_ vm: VirtualMachine, _ frame: HostFrame) {
    vm.releaseDirty(frame)  // error: value of type 'VirtualMachine' has no member 'releaseDirty'
    vm.memory.setAccessed(frame)  // error: value of type 'PhysicalMemory' has no member 'setAccessed'
}
