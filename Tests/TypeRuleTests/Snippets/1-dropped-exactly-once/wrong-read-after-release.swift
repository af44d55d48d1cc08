// The page may belong to somebody else by then.

import Frames
import HostMemory

func frame(of page: consuming PageReference) -> HostFrame {  // error: 'page' used after consume
    page.releaseUnused()
    return page.frame
}
