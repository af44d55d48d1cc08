// Bits are numbers; a frame is none.

import Frames
import GuestMemory

func change(_ entry: StageTwoEntry, to frame: HostFrame) {
    let update = EntryUpdate(set: frame)  // error: cannot convert value of type 'HostFrame'
    _ = entry.apply(update, expected: entry.load())
}
