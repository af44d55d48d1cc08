import Audit
import Frames
import GuestMemory

/// The VMM's side of a world's dirty rings. One task of the VMM's at a time.
final class RingHarvest {
    /// By vCPU; nil: it has no ring.
    private let readers: [DirtyRingReader?]
    /// Guest frames that were collected and whose entries no reset has consumed yet.
    private var collected: [GuestFrame] = []

    init(_ cpus: [VirtualCPU]) { readers = cpus.map { $0.ring.map(DirtyRingReader.init) } }

    /// Guest frames, ascending, each once. An entry whose slot is gone, or has become smaller, names nothing.
    /// EINVAL: the vCPU has no ring.
    func collect(_ cpu: Int, _ vm: VirtualMachine) throws(Errno) -> [GuestFrame] {
        guard let reader = readers[cpu] else { throw .EINVAL }
        var found: [GuestFrame] = []
        for entry in reader.collect() {
            let frame: GuestFrame? = vm.withSlots {
                guard let slot = vm.slot(numbered: entry.slot), entry.offset < slot.pageCount else { return nil }
                return slot.baseFrame.advanced(by: Int(entry.offset))
            }
            guard let frame, !found.contains(frame) else { continue }
            found.append(frame)
        }
        found.sort { $0 < $1 }
        collected += found
        return found
    }

    /// What a reset that begins now will have consumed when it returns.
    func takeCollected() -> [GuestFrame] {
        let taken = collected
        collected = []
        return taken
    }
}
