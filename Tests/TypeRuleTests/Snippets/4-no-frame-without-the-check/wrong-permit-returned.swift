// The lock is dropped when the function returns.

import Frames
import GuestMemory

@_lifetime(borrow vm)
func check(_ vm: VirtualMachine, _ faulted: borrowing FaultedFrame) -> InstallPermit? {
    let guardian = vm.lockMMU()
    return guardian.check(faulted)  // error: lifetime-dependent value escapes its scope
}
