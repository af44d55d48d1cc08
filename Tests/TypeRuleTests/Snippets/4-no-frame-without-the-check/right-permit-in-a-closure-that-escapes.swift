import Frames
import GuestMemory

func map(_ guardian: borrowing MMUGuard, _ faulted: borrowing FaultedFrame, _ entry: StageTwoEntry) {
    guard let permit = guardian.check(faulted) else { return }
    _ = entry.install(permit, level: .page4K, attributes: 7)
}
