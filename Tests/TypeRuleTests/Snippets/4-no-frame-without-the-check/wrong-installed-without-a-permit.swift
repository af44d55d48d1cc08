// The number of a frame is no right to map it (I-6).

import Frames
import GuestMemory

func map(_ entry: StageTwoEntry, _ faulted: borrowing FaultedFrame) {
    _ = entry.install(faulted.frame, level: .page4K, attributes: 7)  // error: cannot convert value of type 'HostFrame'
}
