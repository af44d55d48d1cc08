// After the lock the leaf may be gone, and its frame somebody else's.

import Frames
import GuestMemory

func split(_ vm: VirtualMachine, _ huge: StageTwoEntry, into first: StageTwoEntry) {
    let guardian = vm.lockMMU()
    let seen = huge.observe(holding: guardian)
    guardian.unlock()  // error: noncopyable 'guardian' cannot be consumed when
    first.storePart(of: seen, index: 0, childLevel: .page4K, EntryUpdate())
}
