// An update changes rights, never the frame.

import Frames
import GuestMemory

func change(_ entry: StageTwoEntry, to frame: HostFrame) {
    let update = EntryUpdate(frame: frame)  // error: extra argument 'frame' in call
    _ = entry.apply(update, expected: entry.load())
}
