// Prefetch has no snapshot: only under the lock is it known that no invalidation runs.

import Frames
import GuestMemory
import HostMemory

func prefetch(_ page: consuming PageReference, _ frame: GuestFrame, _ entry: StageTwoEntry) {
    let all = PrefetchPermit()  // error: 'PrefetchPermit' initializer is inaccessible
    _ = entry.install(all.permit(for: page, at: frame), level: .page4K, attributes: 7, expected: 0)
    page.releaseUnused()
}
