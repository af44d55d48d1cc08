// The variable lives longer than the lock.

import Frames
import GuestMemory

func map(_ vm: VirtualMachine, _ faulted: borrowing FaultedFrame, _ entry: StageTwoEntry) {
    var kept: InstallPermit? = nil  // error: lifetime-dependent variable 'kept' escapes its scope
    do {
        let guardian = vm.lockMMU()
        kept = guardian.check(faulted)
    }
    if let kept { _ = entry.install(kept, level: .page4K, attributes: 7) }
}
