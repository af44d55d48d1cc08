// After the lock an invalidation may have returned, and the frame is anybody's (I-24).

import GuestMemory

func write(_ cache: FrameCache) {
    let guardian = cache.lockForUse()
    guard let bytes = guardian.check(8) else { return }
    guardian.unlock()  // error: noncopyable 'guardian' cannot be consumed when
    bytes.store(UInt64(1))
}
