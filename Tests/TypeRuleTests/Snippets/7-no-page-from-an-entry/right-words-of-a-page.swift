import Frames
import GuestMemory
import HostMemory

func look(_ host: Host, _ table: TableFrame) -> UInt64 {
    host.tableWords(table.frame).0
}
