import GuestMemory

func keep(_ cache: FrameCache) -> UInt64? {
    let guardian = cache.lockForUse()
    return guardian.check(8)?.load()
}
