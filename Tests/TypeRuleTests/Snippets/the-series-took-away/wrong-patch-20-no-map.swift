// Patch 20: there is no map that might be none, and so nothing to look for it.

import Frames
import GuestMemory

func map(_ vm: VirtualMachine, _ frame: GuestFrame, _ place: UnsafeMutablePointer<HostMap>?) throws(Errno) {
    try vm.map(frame, into: place)  // error: extra argument 'into' in call
}
