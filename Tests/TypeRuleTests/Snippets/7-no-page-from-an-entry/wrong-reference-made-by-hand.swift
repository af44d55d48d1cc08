// An owner that took no reference would put one all the same (I-2).

import Frames
import GuestMemory
import HostMemory

func adopt(_ memory: PhysicalMemory, _ page: OpaquePointer) -> PageReference {
    PageReference(  // error: initializer is inaccessible
        adopting: page, of: memory, holder: .framePage)  // error: cannot convert value of type 'OpaquePointer'
}
