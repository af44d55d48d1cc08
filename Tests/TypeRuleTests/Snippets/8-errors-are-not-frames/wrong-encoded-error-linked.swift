// Nor does a link.

import Frames
import GuestMemory
import HostMemory

func grow(_ error: TranslationError, _ entry: StageTwoEntry) {
    _ = entry.link(HostFrame(error.kernelEncoding), attributes: 7, expected: 0)  // error: cannot convert value of type
}
