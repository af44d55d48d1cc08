// Both copies would release the page.

import GuestMemory

func retry(_ faulted: consuming FaultedFrame) {  // error: 'faulted' consumed more than once
    let first = faulted
    let second = faulted
    first.releaseUnused()
    second.releaseUnused()
}
