// The check reads the snapshot where fault-in left it and nowhere else.

import GuestMemory

func look(_ vm: VirtualMachine, _ faulted: borrowing FaultedFrame) -> Bool {
    vm.mayBeStale(faulted.snapshot, faulted.guestFrame)  // error: 'snapshot' is inaccessible
}
