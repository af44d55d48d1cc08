// The lock alone says nothing of the page.

import GuestMemory

func write(_ cache: FrameCache) {
    let guardian = cache.lockForUse()
    guardian.store(UInt64(1))  // error: value of type 'FrameCacheGuard' has no member 'store'
}
