import Frames
import GuestMemory

func mapAndUnmap(_ vm: VirtualMachine, _ frame: GuestFrame) {
    let map: HostMap
    do throws(Errno) {
        map = try vm.map(frame)
    } catch {
        return
    }
    map.unmap()
}
