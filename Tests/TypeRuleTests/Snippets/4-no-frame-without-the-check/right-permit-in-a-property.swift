import Frames
import GuestMemory

struct Pending: ~Escapable {
    var permit: InstallPermit
}
