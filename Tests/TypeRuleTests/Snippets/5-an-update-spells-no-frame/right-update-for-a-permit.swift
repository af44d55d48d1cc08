import Frames
import GuestMemory

func map(_ entry: StageTwoEntry, _ update: EntryUpdate) {
    _ = entry.apply(update, expected: entry.load())
}
