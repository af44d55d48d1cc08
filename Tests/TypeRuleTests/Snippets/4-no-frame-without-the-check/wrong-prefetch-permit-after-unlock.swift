// After the lock an invalidation may have come and gone.

import Frames
import GuestMemory
import HostMemory

func prefetch(_ vm: VirtualMachine, _ page: consuming PageReference, _ frame: GuestFrame, _ entry: StageTwoEntry) {
    let guardian = vm.lockMMU()
    guard let all = guardian.prefetchPermit() else { return }
    let permit = all.permit(for: page, at: frame)
    guardian.unlock()  // error: noncopyable 'guardian' cannot be consumed when
    _ = entry.install(permit, level: .page4K, attributes: 7, expected: 0)
    page.releaseUnused()
}
