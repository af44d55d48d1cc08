// A pin is counted otherwise than a reference: a put would leave 1023 behind (I-3).

import HostMemory

func end(_ pin: consuming PagePin) {
    pin.releaseUnused()  // error: value of type 'PagePin' has no member 'releaseUnused'
}
