// Patch 18: a translation has no user address among its answers.

import Frames
import GuestMemory

func place(_ faulted: borrowing FaultedFrame) -> UserAddress {
    faulted.userAddress  // error: value of type 'FaultedFrame' has no member 'userAddress'
}
