import Frames
import GuestMemory

func place(_ fault: GuestFault, in slot: MemorySlot) -> UserAddress {
    slot.userAddress(of: fault.frame)
}
