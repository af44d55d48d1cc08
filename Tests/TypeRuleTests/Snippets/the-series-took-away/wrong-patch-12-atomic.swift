// Patch 12: no translation can be asked not to sleep; who may not sleep has the bulk lookup for prefetch.

import Frames
import GuestMemory

func look(_ vm: VirtualMachine, _ frame: GuestFrame) {
    _ = vm.faultIn(
        frame, slot: nil, write: false, atomic: true,  // error: extra argument 'atomic' in call
        snapshot: vm.snapshot())
}
