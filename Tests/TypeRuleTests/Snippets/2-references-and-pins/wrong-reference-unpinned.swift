// A reference was never pinned (I-3).

import HostMemory

func end(_ page: consuming PageReference) {
    page.unpin(dirty: true)  // error: value of type 'PageReference' has no member 'unpin'
}
