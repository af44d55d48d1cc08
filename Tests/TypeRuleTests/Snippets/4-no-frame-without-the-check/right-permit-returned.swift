import Frames
import GuestMemory

@_lifetime(borrow guardian)
func check(_ guardian: borrowing MMUGuard, _ faulted: borrowing FaultedFrame) -> InstallPermit? {
    guardian.check(faulted)
}
