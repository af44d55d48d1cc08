// Who borrows the lock may not drop it under its owner.

import GuestMemory

func age(_ vm: VirtualMachine, holding guardian: borrowing MMUGuard) {  // error: 'guardian' is borrowed and cannot be
    guardian.unlock()
}
