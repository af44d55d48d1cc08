// A frame goes in by install; an update takes no permit and needs none.

import Frames
import GuestMemory

func change(_ entry: StageTwoEntry, _ permit: borrowing InstallPermit) {
    _ = entry.apply(permit, expected: entry.load())  // error: cannot convert value of type 'InstallPermit'
}
