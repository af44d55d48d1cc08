import Frames
import HostMemory

func put(_ page: consuming PageReference) {
    page.releaseUnused()
}
