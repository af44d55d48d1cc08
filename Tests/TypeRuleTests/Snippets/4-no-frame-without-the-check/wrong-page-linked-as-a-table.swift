// A link is an entry too: it may lead to a page table and to nothing else.

import Frames
import GuestMemory
import HostMemory

func map(_ faulted: borrowing FaultedFrame, _ entry: StageTwoEntry) {
    _ = entry.link(faulted.frame, attributes: 7, expected: 0)  // error: cannot convert value of type 'HostFrame'
}
