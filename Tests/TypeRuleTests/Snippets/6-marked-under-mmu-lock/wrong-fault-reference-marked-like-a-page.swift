// A fault's reference can't name something else than mmu_lock for its stability.

import GuestMemory
import HostMemory

func end(_ reference: consuming FaultReference) {
    reference.releaseDirty()  // error: value of type 'FaultReference' has no member 'releaseDirty'
}
