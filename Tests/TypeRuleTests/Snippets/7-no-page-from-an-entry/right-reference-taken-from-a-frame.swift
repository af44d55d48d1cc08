import Frames
import HostMemory

func take(_ space: AddressSpace, _ address: UserAddress) -> PageReference? {
    space.getUserPageFastOnly(address, write: true, holder: .framePage)
}
