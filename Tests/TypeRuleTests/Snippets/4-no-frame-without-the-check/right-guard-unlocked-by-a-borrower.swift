import GuestMemory

func age(_ vm: VirtualMachine, holding guardian: borrowing MMUGuard) {
    _ = guardian.exclusive
}
