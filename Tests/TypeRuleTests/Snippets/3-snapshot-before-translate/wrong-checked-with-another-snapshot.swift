// A snapshot that was taken after the translation would hide the invalidation between them (I-8).

import GuestMemory

func check(_ vm: VirtualMachine, _ faulted: consuming FaultedFrame) {
    let late = vm.snapshot()
    let guardian = vm.lockMMU()
    if let permit = guardian.check(faulted, snapshot: late) { _ = permit.frame }  // error: extra argument 'snapshot'
    faulted.finish(.unused, holding: guardian)
}
