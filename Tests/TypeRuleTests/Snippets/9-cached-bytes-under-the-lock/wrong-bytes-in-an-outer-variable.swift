// Nor may they be put somewhere on the way.

import Frames
import GuestMemory

func keep(_ cache: FrameCache) throws(Errno) {
    var kept: CachedBytes?
    try cache.withBytes(8) { kept = $0 }  // error: lifetime-dependent
    kept?.store(UInt64(1))
}
