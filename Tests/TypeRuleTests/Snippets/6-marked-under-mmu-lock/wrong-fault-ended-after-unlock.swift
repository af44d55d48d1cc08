// This is the bug that five architectures had: unlock, then mark (I-10).

import GuestMemory

func end(_ vm: VirtualMachine, _ faulted: consuming FaultedFrame) {
    let guardian = vm.lockMMU()  // error: 'guardian' used after consume
    guardian.unlock()
    faulted.finish(.used(dirty: true), holding: guardian)
}
