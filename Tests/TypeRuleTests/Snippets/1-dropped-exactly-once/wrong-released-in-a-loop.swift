// One reference, four puts.

import HostMemory

func release(_ page: consuming PageReference) {  // error: 'page' consumed in a loop
    for _ in 0..<4 { page.releaseUnused() }
}
