import Frames
import GuestMemory

func join(_ leaf: StageTwoEntry, _ link: StageTwoEntry, _ expected: UInt64, holding guardian: borrowing MMUGuard) {
    let seen = leaf.observe(holding: guardian)
    _ = link.replaceTable(byJoining: seen, level: .page2M, EntryUpdate(), expected: expected)
}
