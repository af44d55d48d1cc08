// Patch 17: what an x86 fault is served from has no user address, for nobody needs one beside the slot's.

import Frames
import GuestMemory

func place(_ fault: GuestFault, in slot: MemorySlot) -> UserAddress {
    fault.userAddress  // error: value of type 'GuestFault' has no member 'userAddress'
}
