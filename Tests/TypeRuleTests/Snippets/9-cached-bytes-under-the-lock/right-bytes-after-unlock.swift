import GuestMemory

func write(_ cache: FrameCache) {
    let guardian = cache.lockForUse()
    guard let bytes = guardian.check(8) else { return }
    bytes.store(UInt64(1))
}
