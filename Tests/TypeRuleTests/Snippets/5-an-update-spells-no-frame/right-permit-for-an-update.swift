import Frames
import GuestMemory

func change(_ entry: StageTwoEntry, _ permit: borrowing InstallPermit) {
    _ = entry.install(permit, level: .page4K, attributes: 7, expected: entry.load())
}
