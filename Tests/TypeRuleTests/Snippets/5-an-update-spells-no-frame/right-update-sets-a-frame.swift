import Frames
import GuestMemory

func allow(_ entry: StageTwoEntry) {
    let update = EntryUpdate(set: 2)
    _ = entry.apply(update, expected: entry.load())
}
