import GuestMemory

func look(_ vm: VirtualMachine, _ faulted: borrowing FaultedFrame) -> Bool {
    vm.mayBeStale(faulted)
}
