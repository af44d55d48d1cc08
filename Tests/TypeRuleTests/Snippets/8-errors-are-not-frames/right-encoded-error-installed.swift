import Frames
import GuestMemory

func map(_ permit: borrowing InstallPermit, _ entry: StageTwoEntry) {
    _ = entry.install(permit, level: .page4K, attributes: 7)
}
