import GuestMemory

func write(_ cache: FrameCache) {
    let guardian = cache.lockForUse()
    guardian.check(8)?.store(UInt64(1))
}
