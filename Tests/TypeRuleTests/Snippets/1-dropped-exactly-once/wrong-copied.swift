// Two owners of one reference: each would put it.

import HostMemory

func share(_ page: consuming PageReference) {  // error: 'page' consumed more than once
    let other = page
    page.releaseUnused()
    other.releaseUnused()
}
