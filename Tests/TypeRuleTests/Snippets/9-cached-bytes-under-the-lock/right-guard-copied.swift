import GuestMemory

func both(_ cache: FrameCache) {
    let guardian = cache.lockForUse()
    let other = guardian
    other.unlock()
}
