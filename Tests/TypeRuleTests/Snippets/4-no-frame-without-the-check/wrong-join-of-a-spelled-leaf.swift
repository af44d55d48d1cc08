// A huge leaf may only join leaves that are there.

import Frames
import GuestMemory

func join(_ faulted: borrowing FaultedFrame, _ link: StageTwoEntry, _ expected: UInt64) {
    let leaf = faulted.frame.physicalAddress | 7
    _ = link.replaceTable(
        byJoining: leaf,  // error: cannot convert value of type 'UInt64' to expected argument type 'ObservedEntry'
        level: .page2M, EntryUpdate(), expected: expected)
}
