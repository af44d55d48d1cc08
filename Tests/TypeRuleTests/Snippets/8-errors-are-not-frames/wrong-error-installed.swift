// Nor does it take the error itself.

import Frames
import GuestMemory

func map(_ error: TranslationError, _ entry: StageTwoEntry) {
    _ = entry.install(error, level: .page4K, attributes: 7)  // error: cannot convert value of type 'TranslationError'
}
