// An encoded error can be written as a number, but install takes frames from permits alone, and
// permits come from translations alone (I-18).

import Frames
import GuestMemory

func map(_ error: TranslationError, _ entry: StageTwoEntry) {
    let frame = HostFrame(error.kernelEncoding)
    _ = entry.install(frame, level: .page4K, attributes: 7)  // error: cannot convert value of type 'HostFrame'
}
