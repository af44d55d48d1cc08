import Frames
import GuestMemory

func protect(_ entry: StageTwoEntry) {
    let update = EntryUpdate(clear: 2)
    _ = entry.apply(update, expected: entry.load())
}
