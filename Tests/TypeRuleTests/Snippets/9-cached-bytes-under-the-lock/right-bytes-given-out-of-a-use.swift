import Frames
import GuestMemory

func first(_ cache: FrameCache) throws(Errno) {
    try cache.withBytes(8) { $0.store(UInt64(1)) }
}
