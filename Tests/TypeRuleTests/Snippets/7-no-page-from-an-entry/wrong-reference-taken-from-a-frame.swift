// A frame's number says nothing about whether it is counted (I-2, I-4).

import Frames
import HostMemory

func take(_ memory: PhysicalMemory, _ frame: HostFrame) -> Bool {
    memory.tryGet(frame)  // error: 'tryGet' is inaccessible // error: cannot convert value of type 'HostFrame'
}
