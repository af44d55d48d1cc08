import Frames
import GuestMemory
import HostMemory

func look(_ memory: PhysicalMemory, _ entry: StageTwoEntry) -> Bool {
    memory.isReserved(entry.field.frame(in: entry.load()))
}
