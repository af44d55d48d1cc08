// What leaves the closure has left the lock.

import Frames
import GuestMemory

func first(_ cache: FrameCache) throws(Errno) {
    let bytes: CachedBytes = try cache.withBytes(8) { $0 }  // error: requires that 'CachedBytes' conform to 'Escapable'
    bytes.store(UInt64(1))
}
