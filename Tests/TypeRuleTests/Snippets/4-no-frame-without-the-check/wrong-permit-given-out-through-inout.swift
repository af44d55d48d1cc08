// The caller would have the permit without the lock.

import Frames
import GuestMemory

func check(
    _ vm: VirtualMachine, _ faulted: borrowing FaultedFrame,
    _ kept: inout InstallPermit?  // error: lifetime-dependent variable 'kept' escapes its scope
) {
    let guardian = vm.lockMMU()
    kept = guardian.check(faulted)
}
