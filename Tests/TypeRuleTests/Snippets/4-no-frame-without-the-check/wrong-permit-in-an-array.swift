// What is in an array can be taken out whenever one likes.

import Frames
import GuestMemory

func map(_ vm: VirtualMachine, _ faulted: borrowing FaultedFrame, _ entry: StageTwoEntry) {
    let guardian = vm.lockMMU()
    guard let permit = guardian.check(faulted) else { return }
    let permits = [permit]  // error: requires that 'InstallPermit' conform to 'Escapable'
    _ = permits
}
