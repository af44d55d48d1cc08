// After the lock writeback may have cleaned the page: the mark would come too late (I-10).

import GuestMemory

func end(_ faulted: consuming FaultedFrame) {
    faulted.finish(.used(dirty: true))  // error: missing argument for parameter 'holding' in call
}
