import GuestMemory

func check(_ vm: VirtualMachine, _ faulted: consuming FaultedFrame) {
    let guardian = vm.lockMMU()
    if let permit = guardian.check(faulted) { _ = permit.frame }
    faulted.finish(.unused, holding: guardian)
}
