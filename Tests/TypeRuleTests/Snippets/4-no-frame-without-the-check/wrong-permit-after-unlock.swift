// After the lock a notifier may have zapped the frame, and freed it (I-6).

import Frames
import GuestMemory

func map(_ vm: VirtualMachine, _ faulted: borrowing FaultedFrame, _ entry: StageTwoEntry) {
    let guardian = vm.lockMMU()
    guard let permit = guardian.check(faulted) else { return }
    guardian.unlock()  // error: noncopyable 'guardian' cannot be consumed when
    _ = entry.install(permit, level: .page4K, attributes: 7)
}
