import HostMemory

func unpin(_ pin: consuming PagePin) { pin.unpin(dirty: false) }

func end(_ pin: consuming PagePin) {
    unpin(pin)
}
