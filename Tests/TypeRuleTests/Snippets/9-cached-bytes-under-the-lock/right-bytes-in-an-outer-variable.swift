import Frames
import GuestMemory

func keep(_ cache: FrameCache) throws(Errno) {
    var kept: UInt64 = 0
    try cache.withBytes(8) { kept = $0.load() }
    _ = kept
}
