// Nor may they be put somewhere on the way.

import Frames
import GuestMemory

func keep(_ cache: FrameCache) throws(Errno) {
    var kept: CachedBytes?  // error: lifetime-dependent variable 'kept' escapes its scope
    try cache.withBytes(8) { kept = $0 }
    kept?.store(UInt64(1))
}
