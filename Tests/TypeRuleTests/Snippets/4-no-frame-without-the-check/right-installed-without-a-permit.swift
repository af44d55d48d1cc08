import Frames
import GuestMemory

func map(_ vm: VirtualMachine, _ faulted: borrowing FaultedFrame, _ entry: StageTwoEntry) {
    let guardian = vm.lockMMU()
    guard let permit = guardian.check(faulted) else { return }
    _ = entry.install(permit, level: .page4K, attributes: 7)
}
