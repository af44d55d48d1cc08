import Frames
import GuestMemory

func split(_ huge: StageTwoEntry, into first: StageTwoEntry, holding guardian: borrowing MMUGuard) {
    let seen = huge.observe(holding: guardian)
    first.storePart(of: seen, index: 0, childLevel: .page4K, EntryUpdate())
}
