import GuestMemory

func end(_ faulted: consuming FaultedFrame, holding guardian: borrowing MMUGuard) {
    faulted.finish(.used(dirty: true), holding: guardian)
}
