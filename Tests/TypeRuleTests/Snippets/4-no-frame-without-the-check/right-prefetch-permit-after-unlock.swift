import Frames
import GuestMemory
import HostMemory

func prefetch(_ vm: VirtualMachine, _ page: consuming PageReference, _ frame: GuestFrame, _ entry: StageTwoEntry) {
    let guardian = vm.lockMMU()
    guard let all = guardian.prefetchPermit() else { return }
    _ = entry.install(all.permit(for: page, at: frame), level: .page4K, attributes: 7, expected: 0)
    page.releaseClean(stabilisedBy: .mmuLock)
}
