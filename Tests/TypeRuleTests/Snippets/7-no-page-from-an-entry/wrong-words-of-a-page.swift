// The words of a page frame are for page tables; those of a guest's page are out of reach.

import Frames
import GuestMemory
import HostMemory

func look(_ host: Host, _ entry: StageTwoEntry) -> UInt64 {
    _ = host.tablePage(entry.field.frame(in: entry.load()))  // error: 'tablePage' is inaccessible
    return 0
}
