import Frames
import GuestMemory

func place(_ faulted: borrowing FaultedFrame) -> UserAddress {
    faulted.slot.userAddress(of: faulted.guestFrame)
}
