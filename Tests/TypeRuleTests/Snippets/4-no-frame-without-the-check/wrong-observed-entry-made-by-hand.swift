// What was not read from an entry was not observed.

import Frames
import GuestMemory

func split(_ faulted: borrowing FaultedFrame, into first: StageTwoEntry) {
    let seen = ObservedEntry(faulted.frame.physicalAddress | 7)  // error: 'ObservedEntry' initializer is inaccessible
    first.storePart(of: seen, index: 0, childLevel: .page4K, EntryUpdate())
}
