// What is put must be what was got: the owner puts it (I-2).

import Frames
import HostMemory

func put(_ memory: PhysicalMemory, _ frame: HostFrame) {
    memory.put(frame)  // error: 'put' is inaccessible // error: cannot convert value of type 'HostFrame'
}
