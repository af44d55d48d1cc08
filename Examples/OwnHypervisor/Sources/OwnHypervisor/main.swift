// A small hypervisor of your own: it gives a guest 4 MiB of its own RAM and a device page, runs a guest program against
// them, takes memory away under the running guest, and migrates what the guest wrote.
//
// Everything here is Faultline's public API. Each step says what KVM would do at that point.

import Audit
import Frames
import GuestMemory
import HostMemory
import Machine
import Paging

/// Prints what is wrong and ends the program if `condition` does not hold.
func check(_ condition: Bool, _ what: String) {
    guard condition else { fatalError("not as it should be: \(what)") }
    print("ok: \(what)")
}

// The host: 32 MiB of RAM with page frames, 1 MiB of device memory without. The journal keeps the ledger of references.
let ramFrames = 8192
let deviceFrames = 256
guard let arena = MappedArena(size: (ramFrames + deviceFrames) * 4096) else { fatalError("no memory for the arena") }
let journal = Journal()
let memory = PhysicalMemory(
    arena: arena.base, ramFrames: ramFrames, deviceFrames: deviceFrames, arenaIsZero: true, journal: journal)
let host = Host(memory: memory, transparentHugePages: false)

// The VMM's process: its RAM for the guest is plain anonymous memory; the device is mapped by its driver.
let process = AddressSpace(host: host)
let ram = UserAddress(0x7f00_0000_0000)
let ramSize: UInt64 = 4 << 20
let deviceWindow = UserAddress(0x7f00_4000_0000)
try process.map(at: ram, length: ramSize, protection: .readWrite, backing: .anonymous)
guard let device = DeviceBAR(host, pages: 1, filling: .byFault) else { fatalError("no device memory left") }
try process.map(at: deviceWindow, length: 4096, protection: .readWrite, backing: .driver(device))

// The VM: Intel's two-dimensional paging. Swap the line for `.gStage(GStageMMU(mode: .sv39x4))` and it is a RISC-V.
let tables = StageTwoTables.tdp(TDPMMU())
let vm = VirtualMachine(addressSpace: process, mmu: tables.mmu)
let cpu = GuestCPU(number: 0, vm: vm, tables: tables)
vm.add(cpu)

// Two slots, as with KVM_SET_USER_MEMORY_REGION. Nothing is mapped yet: the first access to each page faults.
let guestRAM = GuestAddress(0)
let guestDevice = GuestAddress(0xfe00_0000)
try vm.setMemoryRegion(MemoryRegion(slot: 0, guestAddress: guestRAM, size: ramSize, userAddress: ram))
try vm.setMemoryRegion(MemoryRegion(slot: 1, guestAddress: guestDevice, size: 4096, userAddress: deviceWindow))

// The guest writes a word in each of its first 64 pages and reads them back.
for page in 0..<UInt64(64) {
    guard cpu.access(.write, guestRAM + page * 4096, value: 0x1000 + page) == .stored else { fatalError("store") }
}
check(
    (0..<UInt64(64)).allSatisfy { cpu.access(.read, guestRAM + $0 * 4096) == .value(0x1000 + $0) },
    "the guest reads what it wrote")
check(try process.load(ram + 5 * 4096) == 0x1005, "the hypervisor sees it too, through its own mapping")

// The device's page has no page frame behind it: KVM maps it and takes no reference.
check(cpu.access(.write, guestDevice, value: 0xcafe) == .stored, "the guest reaches the device")
check(journal.holdings.isEmpty, "KVM holds no reference behind any entry")

// Outside of every slot is MMIO, for the hypervisor to emulate.
check(cpu.access(.read, GuestAddress(0x1_0000_0000)) == .mmio, "an access to a hole leaves for the hypervisor")

// Memory goes away under the guest: the notifier takes the entries out before the pages are freed, and the guest faults
// fresh zeroed pages in.
try process.advise(ram..<(ram + 16 * 4096), .dontNeed)
check(cpu.access(.read, guestRAM) == .value(0), "a page that was given back reads as zero")
check(cpu.access(.read, guestRAM + 20 * 4096) == .value(0x1014), "its neighbours are untouched")

// Migration: log the guest's writes and fetch them. KVM write-protects; it never touches the pages for it.
try vm.setMemoryRegion(
    MemoryRegion(
        slot: 0, flags: SlotFlags(logDirtyPages: true), guestAddress: guestRAM, size: ramSize, userAddress: ram))
for page in [UInt64(3), 40, 41] { _ = cpu.access(.write, guestRAM + page * 4096, value: page) }
let log = try vm.getDirtyLog(slot: 0)
check(log[0] == 1 << 3 | 1 << 40 | 1 << 41, "the dirty log has exactly the pages that the guest wrote")

// The end: no reference, no entry, no page is left.
vm.destroy()
process.exit()
journal.checkQuiescent()
check(journal.findings.isEmpty, "every rule held, every reference was dropped exactly once")
