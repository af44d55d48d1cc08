import GuestMemory

func look(_ vm: VirtualMachine, _ faulted: borrowing FaultedFrame, holding guardian: borrowing MMUGuard) -> Bool {
    if let permit = guardian.check(faulted) { return permit.writable }
    return false
}
