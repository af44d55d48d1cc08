// A lock that exists is not a lock that is held.

import GuestMemory

func end(_ vm: VirtualMachine, _ faulted: consuming FaultedFrame) {
    faulted.finish(.used(dirty: true), holding: vm.mmuLock)  // error: cannot convert value of type 'ReadWriteLock'
}
