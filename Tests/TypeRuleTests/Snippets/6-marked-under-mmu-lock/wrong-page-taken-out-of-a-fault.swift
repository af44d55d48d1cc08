// A fault's reference does not become a page reference, whose release needs no guard.

import GuestMemory
import HostMemory

func take(_ faulted: consuming FaultedFrame) {
    let reference = faulted.reference  // error: 'reference' is inaccessible
    _ = consume reference
}
