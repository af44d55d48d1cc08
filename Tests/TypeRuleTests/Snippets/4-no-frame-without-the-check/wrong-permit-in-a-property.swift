// An object lives as long as it likes.

import Frames
import GuestMemory

struct Pending {
    var permit: InstallPermit  // error: has non-Escapable type 'InstallPermit'
}
