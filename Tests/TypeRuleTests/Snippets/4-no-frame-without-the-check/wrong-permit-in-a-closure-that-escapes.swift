// Such a closure may run after the lock is dropped.

import Frames
import GuestMemory

func map(_ vm: VirtualMachine, _ faulted: borrowing FaultedFrame, _ entry: StageTwoEntry) -> () -> Void {
    let guardian = vm.lockMMU()
    guard let permit = guardian.check(faulted) else { return {} }  // error: 'permit' escapes its scope
    return { _ = entry.install(permit, level: .page4K, attributes: 7) }
}
