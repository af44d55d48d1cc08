import Frames
import GuestMemory
import HostMemory

func zap(_ policy: Precise, _ frame: HostFrame) {
    policy.leafRemoved(frame, counted: true, accessed: true, dirty: true)
}
