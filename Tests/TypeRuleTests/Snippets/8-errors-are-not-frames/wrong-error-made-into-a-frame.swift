// An error is a case of an enum, not a number with high bits (I-18).

import Frames

func frame(of error: TranslationError) -> HostFrame {
    HostFrame(error)  // error: cannot convert value of type 'TranslationError' to expected argument type 'UInt64'
}
