// The same for the reference inside the fault (I-10).

import GuestMemory

func end(_ reference: consuming FaultReference) {
    reference.release(.used(dirty: false))  // error: missing argument for parameter 'holding' in call
}
