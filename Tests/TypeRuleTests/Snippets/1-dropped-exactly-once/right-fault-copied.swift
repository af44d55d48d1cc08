import GuestMemory

func retry(_ faulted: consuming FaultedFrame) {
    let first = faulted
    first.releaseUnused()
}
