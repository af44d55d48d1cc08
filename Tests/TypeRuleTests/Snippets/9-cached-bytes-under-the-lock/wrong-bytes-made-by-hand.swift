// Only a check gives bytes.

import GuestMemory
import Synchrony

func make(_ cache: FrameCache, _ page: UnsafeMutableRawPointer) {
    _ = CachedBytes(cache, SharedBytes(at: page), 8)  // error: 'CachedBytes' initializer is inaccessible
}
