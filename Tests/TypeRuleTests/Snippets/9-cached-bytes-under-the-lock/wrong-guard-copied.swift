// One lock, dropped twice; and the first drop would leave a guard without a lock.

import GuestMemory

func both(_ cache: FrameCache) {
    let guardian = cache.lockForUse()  // error: 'guardian' consumed more than once
    let other = guardian
    guardian.unlock()
    other.unlock()
}
