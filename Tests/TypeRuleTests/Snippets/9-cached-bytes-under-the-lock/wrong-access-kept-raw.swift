// Nor does the address of the bytes come out.

import GuestMemory

func keep(_ cache: FrameCache) -> UnsafeMutableRawPointer? {
    let guardian = cache.lockForUse()
    return guardian.check(8)?.start.start  // error: 'start' is inaccessible due to
}
