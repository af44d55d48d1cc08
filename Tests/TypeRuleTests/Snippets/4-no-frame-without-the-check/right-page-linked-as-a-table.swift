import Frames
import GuestMemory
import HostMemory

func grow(_ host: Host, _ entry: StageTwoEntry) {
    guard let frame = host.allocateTable(order: 0, fill: 0) else { return }
    _ = entry.link(host.table(frame), attributes: 7, expected: 0)
}
