import Audit
import Frames
import GuestMemory
import HostMemory
import Machine
import Paging
import TraceAudit

/// Why a recording can't be replayed.
public struct ReplayError: Error, Sendable, CustomStringConvertible {
    public var description: String
}

/// The model that does what the recorded program did: a process with the same mappings, a VM with the same slots, and
/// vCPUs that run the same accesses under the shadow MMU.
///
/// The guest is the one of the recordings: its code, stack, task state and page tables lie at fixed places of slot 500, and
/// a run ends with an OUT instruction, which KVM emulates.
final class ReplayMachine {
    /// Collects what the model tells.
    private final class Listener: EventObserver {
        var told: [ReplayObservation] = []
        override func observe(_ event: Event) {
            if let observation = ReplayObservation(event) { told.append(observation) }
        }
    }

    private let arena: MappedArena
    private let host: Host
    let space: AddressSpace
    private var child: AddressSpace?
    private let mmu = ShadowMMU()
    let vm: VirtualMachine
    private var cpus: [PagedCPU] = []
    private let listener = Listener()
    private let journal = Journal(keepsEvents: false)
    private var mapped: [Range<UInt64>] = []
    private let recorded: RecordedRun

    init(_ recorded: RecordedRun) throws(ReplayError) {
        self.recorded = recorded
        var bytes: UInt64 = 64 << 20
        for slot in recorded.slots { bytes += min(slot.size, 1 << 32) * 2 }
        bytes = min(bytes, 16 << 30)
        guard let arena = MappedArena(size: Int(bytes)) else {
            throw ReplayError(description: "this machine has no room for a host of \(bytes >> 20) MiB")
        }
        self.arena = arena
        let memory = PhysicalMemory(
            arena: arena.base, ramFrames: Int(bytes >> 12), arenaIsZero: true, journal: journal)
        host = Host(memory: memory, transparentHugePages: false)
        space = AddressSpace(host: host)
        vm = VirtualMachine(addressSpace: space, mmu: mmu)
        journal.observer = listener
    }

    /// What has been told since the last call. Only ranges of guest memory count: the rest of the process is not modelled.
    func told() -> [ReplayObservation] {
        defer { listener.told = [] }
        return listener.told
    }

    /// Findings of the model's own rules.
    var findings: [Audit.Finding] { journal.findings }

    func cpu(_ number: Int) -> PagedCPU {
        while cpus.count <= number {
            let cpu = PagedCPU(number: cpus.count, vm: vm, mmu: mmu)
            vm.add(cpu)
            mmu.load(.longMode(root: GuestAddress(Guest.base + 0x10000)), on: cpu)
            cpus.append(cpu)
        }
        return cpus[number]
    }

    // MARK: Slots

    func setRegion(_ request: SlotRequest) throws(ReplayError) -> Errno? {
        if request.size > 0 { try map(request) }
        do throws(Errno) {
            try vm.setMemoryRegion(
                MemoryRegion(
                    slot: UInt32(truncatingIfNeeded: request.slot),
                    flags: SlotFlags(logDirtyPages: request.flags & 1 != 0, readOnly: request.flags & 2 != 0),
                    guestAddress: GuestAddress(request.guestAddress), size: request.size,
                    userAddress: UserAddress(request.hostAddress)))
            return nil
        } catch { return error }
    }

    /// The memory behind a slot, anonymous, with large pages if the recorded kernel had some there.
    private func map(_ request: SlotRequest) throws(ReplayError) {
        let range = request.hostAddress..<request.hostAddress + request.size
        guard !mapped.contains(where: { $0.overlaps(range) }) else { return }
        mapped.append(range)
        let frames = request.guestAddress >> 12..<(request.guestAddress + request.size) >> 12
        do throws(Errno) {
            try space.map(
                at: UserAddress(range.lowerBound), length: request.size, protection: .readWrite, backing: .anonymous)
            if recorded.largeFrames.contains(where: frames.contains) {
                try space.advise(UserAddress(range.lowerBound)..<UserAddress(range.upperBound), .hugePage)
            }
            if request.guestAddress == Guest.base { try Guest(recorded, request).write(into: space) }
        } catch {
            throw ReplayError(description: "the model can't map the memory of slot \(request.slot): \(error)")
        }
    }

    /// Whether an address belongs to a slot that was ever set.
    func isGuestMemory(_ start: UInt64, _ end: UInt64) -> Bool {
        mapped.contains { $0.overlaps(start..<max(end, start + 1)) }
    }

    func dirtyPages(_ slot: UInt64) throws(ReplayError) -> UInt64 {
        do throws(Errno) {
            var count: UInt64 = 0
            for word in try vm.getDirtyLog(slot: UInt32(truncatingIfNeeded: slot)) {
                count += UInt64(word.nonzeroBitCount)
            }
            return count
        } catch { throw ReplayError(description: "KVM_GET_DIRTY_LOG of slot \(slot) failed in the model: \(error)") }
    }

    /// Pages that the next harvest would report.
    func dirtyCount(_ slot: UInt64) -> UInt64 {
        guard let bitmap = vm.slot(numbered: UInt32(truncatingIfNeeded: slot))?.dirtyBitmap else { return 0 }
        return (0..<bitmap.pages).reduce(0) { $0 + (bitmap.contains($1) ? 1 : 0) }
    }

    // MARK: Host actions

    /// Does what a phase of the recorded program did to guest memory, as far as its name and the kernel's ranges tell. Of a
    /// phase with another name each range is given up, or, where its pages come back, only unmapped.
    ///
    /// - Parameter staysWhereItIs: whether the pages of a range are found again under their frames.
    func perform(
        _ phase: String, _ ranges: [Range<UInt64>], _ staysWhereItIs: (Range<UInt64>) -> Bool
    ) throws(ReplayError) {
        func user(_ range: Range<UInt64>) -> Range<UserAddress> {
            UserAddress(range.lowerBound)..<UserAddress(range.upperBound)
        }
        do throws(Errno) {
            if phase.contains("fork") {
                child = try space.fork()
            } else if phase.contains("child exit") {
                child?.exit()
                child = nil
            } else if let first = ranges.first, let last = ranges.last {
                if phase.contains("munmap") {
                    try space.unmap(user(last))
                } else if phase.contains("mremap") {
                    guard let hole = unmapped else { return }
                    try space.remap(user(last), length: UInt64(last.count), to: UserAddress(hole.lowerBound))
                } else if phase.contains("mprotect") {
                    try space.protect(user(last), .read)
                    try space.protect(user(last), .readWrite)
                } else if phase.contains("collapse") {
                    try space.advise(user(first), .collapse)
                } else if phase.contains("free") {
                    try space.advise(user(first), .free)
                } else if phase.contains("dontneed") {
                    try space.advise(user(first), .dontNeed)
                } else {
                    for range in ranges {
                        if staysWhereItIs(range) {
                            try space.protect(user(range), .read)
                            try space.protect(user(range), .readWrite)
                        } else {
                            try space.advise(user(range), .dontNeed)
                        }
                    }
                }
                if phase.contains("munmap") { unmapped = last }
            }
        } catch { throw ReplayError(description: "the model can't do what phase \"\(phase)\" did: \(error)") }
    }
    private var unmapped: Range<UInt64>?

    // MARK: The guest

    /// The guest's fetch of its loop, until it is done or has faulted `steps` times.
    func fetch(_ run: GuestRun, steps: Int) -> PagedAccessResult? {
        go(run, .fetch, Guest.code(run.operation) & ~7, steps)
    }

    /// The access of `index`. As `fetch`.
    func access(_ run: GuestRun, _ index: UInt64, steps: Int) -> PagedAccessResult? {
        let access: PagedAccess =
            switch run.operation {
            case .read: .load
            case .write: .store(0x1111 &+ run.guestAddress)
            case .lockedIncrement: .lockedAdd(1)
            }
        return go(run, access, run.guestAddress &+ index &* run.stride, steps)
    }

    private func go(_ run: GuestRun, _ access: PagedAccess, _ address: UInt64, _ steps: Int) -> PagedAccessResult? {
        let cpu = cpu(Int(run.vcpu))
        if steps == .max { return cpu.access(access, at: address) }
        for _ in 0..<steps {
            if let end = cpu.step(access, at: address) { return end }
        }
        return nil
    }

    /// How KVM ends a run. OUT: it emulates that.
    func endWithOut(_ run: GuestRun) {
        cpu(Int(run.vcpu)).walkForOutput(at: Guest.out(run.operation), taskState: Guest.taskState)
    }

    /// MMIO: it reads the instruction of the access itself.
    func endWithMMIO(_ run: GuestRun) {
        let cpu = cpu(Int(run.vcpu))
        vm.withSlots { _ = mmu.translate(cpu, Guest.code(run.operation), [.user, .fetch]) }
    }

    func close() {
        vm.destroy()
        child?.exit()
        space.exit()
    }
}
