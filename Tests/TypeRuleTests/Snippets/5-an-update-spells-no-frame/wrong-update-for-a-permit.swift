// An update gives no right to map.

import Frames
import GuestMemory

func map(_ entry: StageTwoEntry, _ update: EntryUpdate) {
    _ = entry.install(update, level: .page4K, attributes: 7)  // error: cannot convert value of type 'EntryUpdate'
}
