import GuestMemory

func age(_ vm: VirtualMachine) {
    let guardian = vm.lockMMU()
    guardian.unlock()
}
