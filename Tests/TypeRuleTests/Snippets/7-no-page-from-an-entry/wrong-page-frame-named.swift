// Stage-2 code has frame numbers; page frames are the host's (I-4).

import HostMemory

func look(_ page: UnsafePointer<PageFrame>) {}  // error: cannot find type 'PageFrame' in scope
