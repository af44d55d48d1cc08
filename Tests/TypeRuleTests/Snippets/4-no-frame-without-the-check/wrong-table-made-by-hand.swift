// Only the host, which allocates tables, knows what is one.

import Frames
import GuestMemory
import HostMemory

func map(_ faulted: borrowing FaultedFrame, _ entry: StageTwoEntry) {
    let table = TableFrame(faulted.frame)  // error: 'TableFrame' initializer is inaccessible
    _ = entry.link(table, attributes: 7, expected: 0)
}
