// Marking the page of an entry that goes is what the policy guess did (I-4).

import Frames
import GuestMemory
import HostMemory

func zap(_ memory: PhysicalMemory, _ frame: HostFrame) {
    memory.markDirty(frame, .guestFault)  // error: 'markDirty' is inaccessible // error: cannot convert value
}
