// A reference is not a pin (I-3).

import HostMemory

func unpin(_ pin: consuming PagePin) { pin.unpin(dirty: false) }

func end(_ page: consuming PageReference) {
    unpin(page)  // error: cannot convert value of type 'PageReference' to expected argument type 'PagePin'
}
