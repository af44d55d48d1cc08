import Frames
import GuestMemory
import HostMemory

func finish(_ page: consuming PageReference) {
    page.releaseDirty(stabilisedBy: .exclusiveOwner)
}
