// A guard is the lock, held.

import GuestMemory

func age(_ vm: VirtualMachine) {
    let guardian = MMUGuard(vm, exclusive: true)  // error: 'MMUGuard' initializer is inaccessible
    guardian.unlock()
}
