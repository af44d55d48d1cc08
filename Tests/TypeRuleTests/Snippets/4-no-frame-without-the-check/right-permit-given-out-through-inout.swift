import Frames
import GuestMemory

func check(
    _ guardian: borrowing MMUGuard, _ faulted: borrowing FaultedFrame,
    _ level: inout PageLevel?
) {
    if let permit = guardian.check(faulted) { level = permit.largest }
}
