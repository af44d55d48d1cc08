import GuestMemory

func make(_ cache: FrameCache) {
    let guardian = cache.lockForUse()
    _ = guardian.check(8)
}
