// A pin is not a reference (I-3).

import HostMemory

func put(_ page: consuming PageReference) { page.releaseUnused() }

func end(_ pin: consuming PagePin) {
    put(pin)  // error: cannot convert value of type 'PagePin' to expected argument type 'PageReference'
}
