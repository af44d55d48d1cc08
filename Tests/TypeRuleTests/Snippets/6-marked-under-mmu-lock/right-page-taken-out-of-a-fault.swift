import GuestMemory
import HostMemory

func take(_ vm: VirtualMachine, _ faulted: consuming FaultedFrame) {
    let page = vm.page(of: faulted.guestFrame)
    faulted.releaseUnused()
    page?.releaseUnused()
}
