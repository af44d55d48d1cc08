// Patch 21: a map that failed has nothing in it that an unmap could take for its own.

import Frames
import GuestMemory

func mapAndUnmap(_ vm: VirtualMachine, _ frame: GuestFrame) {
    let map: HostMap
    do throws(Errno) {
        map = try vm.map(frame)
    } catch {
    }
    map.unmap()  // error: constant 'map' used before being initialized
}
