// An array hands out copies.

import HostMemory

func keep(_ page: consuming PageReference) {
    let pages = [page]  // error: requires that 'PageReference' conform to 'Copyable'
    _ = pages
}
