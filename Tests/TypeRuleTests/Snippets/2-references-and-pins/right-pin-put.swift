import HostMemory

func end(_ pin: consuming PagePin) {
    pin.unpin(dirty: false)
}
