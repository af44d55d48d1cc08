// A fault's page is released once: under the lock, or unused (I-2, I-17).

import GuestMemory

func end(_ faulted: consuming FaultedFrame, holding guardian: borrowing MMUGuard) {  // error: 'faulted' consumed more
    faulted.finish(.used(dirty: true), holding: guardian)
    faulted.releaseUnused()
}
