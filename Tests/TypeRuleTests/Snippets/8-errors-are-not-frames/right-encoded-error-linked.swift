import Frames
import GuestMemory
import HostMemory

func grow(_ table: TableFrame, _ entry: StageTwoEntry) {
    _ = entry.link(table, attributes: 7, expected: 0)
}
