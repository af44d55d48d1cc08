import Frames
import GuestMemory

func map(_ vm: VirtualMachine, _ faulted: borrowing FaultedFrame, _ entry: StageTwoEntry) {
    let guardian = vm.lockMMU()
    var kept: InstallPermit? = nil
    if !faulted.isCounted { kept = guardian.check(faulted) }
    if let kept { _ = entry.install(kept, level: .page4K, attributes: 7) }
}
