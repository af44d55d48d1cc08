// The reference inside a fault has one owner too.

import GuestMemory

func end(_ reference: consuming FaultReference, holding guardian: borrowing MMUGuard) {  // error: 'reference' consumed
    reference.release(.unused, holding: guardian)
    reference.releaseUnused()
}
