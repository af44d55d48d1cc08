import Frames
import HostMemory

func frame(of page: consuming PageReference) -> HostFrame {
    let frame = page.frame
    page.releaseUnused()
    return frame
}
