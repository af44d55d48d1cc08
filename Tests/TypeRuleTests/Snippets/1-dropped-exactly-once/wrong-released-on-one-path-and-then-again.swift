// On one path the page is put twice.

import HostMemory

func release(_ page: consuming PageReference, written: Bool) {  // error: 'page' consumed more than once
    if written { page.releaseDirty(stabilisedBy: .exclusiveOwner) }
    page.releaseUnused()
}
