import Frames
import HostMemory
import Synchrony

/// What a guest's access comes to.
public enum PortResult: Sendable, Equatable {
    case value(UInt64)
    case stored
    /// Never `.translated`.
    case fault(WalkResult)
    /// The address is no multiple of 8. RISC-V raises its misaligned exception; x86 would split the access, which the
    /// model leaves out.
    case misaligned
}

/// How a vCPU reaches memory: through its TLB, and by a walk where that has nothing. The guest's own paging is off, so
/// its addresses are guest physical ones.
///
/// Belongs to the vCPU's task, as its TLB does. Give it a new `stage` with every root, and flush.
public struct GuestPort {
    public var stage: StageTwo
    public let buffer: TranslationBuffer

    public init(stage: StageTwo, buffer: TranslationBuffer) {
        self.stage = stage
        self.buffer = buffer
    }

    /// Loads 8 bytes. `reached` hears, here and below, of the frame as soon as it has been accessed.
    public func load(_ address: GuestAddress, reached: (HostFrame) -> Void = { _ in }) -> PortResult {
        read(address, .read, reached)
    }

    /// Fetches 8 bytes of instructions.
    public func fetch(_ address: GuestAddress, reached: (HostFrame) -> Void = { _ in }) -> PortResult {
        read(address, .execute, reached)
    }

    /// Stores 8 bytes, or of those the bits of `mask`: a narrower store. The rest is read and written back, so that nobody
    /// else may write it meanwhile.
    public func store(
        _ address: GuestAddress, _ value: UInt64, mask: UInt64 = .max, reached: (HostFrame) -> Void = { _ in }
    ) -> PortResult {
        guard address.value & 7 == 0 else { return .misaligned }
        switch translate(address, .write) {
        case .translated(let translation):
            stage.memory.willWrite(translation.frame)
            schedulingNote(.pageUse, translation.frame.physicalAddress)
            let word = stage.memory.word(at: translation.frame.physicalAddress | address.offset)
            word.storeData(mask == .max ? value : word.loadData() & ~mask | value & mask)
            reached(translation.frame)
            return .stored
        case let failed: return .fault(failed)
        }
    }

    private func read(_ address: GuestAddress, _ access: AccessKind, _ reached: (HostFrame) -> Void) -> PortResult {
        guard address.value & 7 == 0 else { return .misaligned }
        switch translate(address, access) {
        case .translated(let translation):
            schedulingNote(.pageUse, translation.frame.physicalAddress)
            let value = stage.memory.word(at: translation.frame.physicalAddress | address.offset).loadData()
            reached(translation.frame)
            return .value(value)
        case let failed: return .fault(failed)
        }
    }

    /// The translation for one access: from the TLB, else by a walk, which fills it. A fault leaves the TLB without
    /// entries for the frame.
    public func translate(_ address: GuestAddress, _ access: AccessKind) -> WalkResult {
        if let cached = buffer.lookup(address.frame, access) { return .translated(cached) }
        let result = stage.walk(address, access)
        switch result {
        case .translated(let translation): buffer.fill(address.frame, translation)
        case .violation, .misconfiguration: buffer.dropAfterFault(address.frame)
        case .modificationLogFull: break
        }
        return result
    }
}
