// This is pfn_to_page, from a stage-2 entry (I-4).

import Frames
import GuestMemory
import HostMemory

func look(_ memory: PhysicalMemory, _ entry: StageTwoEntry) {
    _ = memory.page(entry.field.frame(in: entry.load()))  // error: 'page' is inaccessible
}
