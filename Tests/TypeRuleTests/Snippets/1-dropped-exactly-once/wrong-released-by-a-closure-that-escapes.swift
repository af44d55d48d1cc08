// Nobody knows how often such a closure is called.

import HostMemory

func later(_ page: consuming PageReference) -> () -> Void {
    { page.releaseUnused() }  // error: noncopyable 'page' cannot be consumed when captured by an escaping closure
}
