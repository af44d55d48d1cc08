import Frames
import GuestMemory

func frame(_ vm: VirtualMachine, _ frame: GuestFrame) -> HostFrame? {
    guard let page = vm.page(of: frame) else { return nil }
    let found = page.frame
    page.releaseUnused()
    return found
}
