import GuestMemory

func both(_ vm: VirtualMachine) {
    let guardian = vm.lockMMU()
    let other = guardian
    other.unlock()
}
