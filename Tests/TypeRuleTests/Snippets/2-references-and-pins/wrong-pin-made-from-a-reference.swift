// None converts into another (I-3).

import HostMemory

func convert(_ page: consuming PageReference) -> PagePin {
    let pin: PagePin = page  // error: cannot convert value of type 'PageReference' to specified type 'PagePin'
    return pin
}
