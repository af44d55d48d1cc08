import GuestMemory

func end(_ reference: consuming FaultReference) {
    reference.releaseUnused()
}
