// The word of an entry could store anything, a frame among it.

import Frames
import GuestMemory

func map(_ vm: VirtualMachine, _ faulted: borrowing FaultedFrame, _ entry: StageTwoEntry) {
    entry.word.store(faulted.frame.physicalAddress | 7)  // error: 'word' is inaccessible
}
