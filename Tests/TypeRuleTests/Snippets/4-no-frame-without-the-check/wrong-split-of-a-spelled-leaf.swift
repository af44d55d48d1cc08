// A part may only be of a leaf that is there: a number could spell any frame.

import Frames
import GuestMemory

func split(_ faulted: borrowing FaultedFrame, into first: StageTwoEntry) {
    let leaf = faulted.frame.physicalAddress | 7
    first.storePart(of: leaf, index: 0, childLevel: .page4K, EntryUpdate())  // error: cannot convert value
}
