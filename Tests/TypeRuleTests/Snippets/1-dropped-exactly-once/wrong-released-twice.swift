// The second put would drop a reference that is not KVM's (I-2).

import HostMemory

func release(_ page: consuming PageReference) {  // error: 'page' consumed more than once
    page.releaseUnused()
    page.releaseUnused()
}
