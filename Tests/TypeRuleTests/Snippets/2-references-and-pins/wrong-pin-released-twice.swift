// A pin is dropped exactly once as well.

import HostMemory

func end(_ pin: consuming PagePin) {  // error: 'pin' consumed more than once
    pin.unpin(dirty: true)
    pin.unpin(dirty: false)
}
