// Only the retry check under mmu_lock gives a permit.

import Frames
import GuestMemory

func map(_ faulted: borrowing FaultedFrame, _ entry: StageTwoEntry) {
    let permit = InstallPermit(  // error: 'InstallPermit' initializer is inaccessible
        guestFrame: faulted.guestFrame, frame: faulted.frame, largest: .page4K, writable: true, counted: true)
    _ = entry.install(permit, level: .page4K, attributes: 7)
}
