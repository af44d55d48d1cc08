// One lock, dropped twice; and the first drop would leave a guard without a lock.

import GuestMemory

func both(_ vm: VirtualMachine) {
    let guardian = vm.lockMMU()  // error: 'guardian' consumed more than once
    let other = guardian
    guardian.unlock()
    other.unlock()
}
