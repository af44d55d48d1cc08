import GuestMemory

func end(_ vm: VirtualMachine, _ faulted: consuming FaultedFrame) {
    let guardian = vm.lockMMUForFault()
    faulted.finish(.used(dirty: true), holding: guardian)
}
