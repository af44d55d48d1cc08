import GuestMemory

func end(_ reference: consuming FaultReference, holding guardian: borrowing MMUGuard) {
    reference.release(.unused, holding: guardian)
}
