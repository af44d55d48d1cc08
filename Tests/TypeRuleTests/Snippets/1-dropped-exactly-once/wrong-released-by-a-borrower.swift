// Who only looks at a page may not put it: its owner will.

import HostMemory

func look(at page: borrowing PageReference) {  // error: 'page' is borrowed and cannot be consumed
    page.releaseUnused()
}
