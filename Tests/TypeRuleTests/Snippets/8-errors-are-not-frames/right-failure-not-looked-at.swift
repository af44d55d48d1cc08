import Frames
import GuestMemory

func fault(_ vm: VirtualMachine, _ frame: GuestFrame, _ slot: MemorySlot) -> FaultOutcome {
    switch vm.faultIn(frame, slot: slot, write: true, snapshot: vm.snapshot()) {
    case .failed(let error, _): return error == .noSlot ? .emulate : .failed(.EFAULT)
    case .frame(let faulted):
        let guardian = vm.lockMMU()
        faulted.finish(.unused, holding: guardian)
        return .retry
    }
}
