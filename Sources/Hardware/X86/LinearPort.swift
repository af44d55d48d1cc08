import Frames
import HostMemory
import Synchrony

/// What an access to a linear address comes to.
public enum LinearPortResult: Sendable, Equatable {
    /// What was loaded, or stood there before a locked addition.
    case value(UInt64)
    case stored
    /// Never `.translated`.
    case fault(LinearResult)
    /// The address is no multiple of 8: x86 would split the access, which the model leaves out.
    case misaligned
}

/// How a vCPU reaches memory at linear addresses: through its TLB, and by a walk where that has nothing. Under shadow
/// paging the walker's tables are the shadow ones in physical memory; in two dimensions they are the guest's own.
///
/// Belongs to the vCPU's task, as its TLB does. Give it a new `walker` with every change of the registers, and flush where
/// the processor would.
public struct LinearPort {
    public var walker: LegacyWalker
    public let buffer: LinearTranslationBuffer

    public init(walker: LegacyWalker, buffer: LinearTranslationBuffer) {
        self.walker = walker
        self.buffer = buffer
    }

    /// Loads 8 bytes. `reached` hears, here and below, of the frame as soon as it has been accessed. An implicit access is
    /// the processor's own, to a descriptor table.
    public func load(
        _ address: UInt64, implicit: Bool = false, reached: (HostFrame) -> Void = { _ in }
    ) -> LinearPortResult {
        read(address, LinearAccess(.read, implicit: implicit), reached)
    }

    /// Fetches 8 bytes of instructions.
    public func fetch(_ address: UInt64, reached: (HostFrame) -> Void = { _ in }) -> LinearPortResult {
        read(address, .execute, reached)
    }

    /// Stores 8 bytes, or of those the bits of `mask`: a narrower store. The rest is read and written back, so that nobody
    /// else may write it meanwhile.
    public func store(
        _ address: UInt64, _ value: UInt64, mask: UInt64 = .max, reached: (HostFrame) -> Void = { _ in }
    ) -> LinearPortResult {
        change(address, reached) { word in
            word.storeData(mask == .max ? value : word.loadData() & ~mask | value & mask)
            return .stored
        }
    }

    /// Adds to 8 bytes in one step; the result is the old value. x86: `lock xadd`.
    public func lockedAdd(
        _ address: UInt64, _ value: UInt64, reached: (HostFrame) -> Void = { _ in }
    ) -> LinearPortResult {
        change(address, reached) { word in .value(word.addData(value)) }
    }

    private func change(
        _ address: UInt64, _ reached: (HostFrame) -> Void, _ body: (AtomicWord) -> LinearPortResult
    ) -> LinearPortResult {
        guard address & 7 == 0 else { return .misaligned }
        switch translate(address, .write) {
        case .translated(let translation):
            walker.memory.willWrite(translation.frame)
            schedulingNote(.pageUse, translation.frame.physicalAddress)
            let result = body(word(of: translation, address))
            reached(translation.frame)
            return result
        case let failed: return .fault(failed)
        }
    }

    private func read(
        _ address: UInt64, _ access: LinearAccess, _ reached: (HostFrame) -> Void
    ) -> LinearPortResult {
        guard address & 7 == 0 else { return .misaligned }
        switch translate(address, access) {
        case .translated(let translation):
            schedulingNote(.pageUse, translation.frame.physicalAddress)
            let value = word(of: translation, address).loadData()
            reached(translation.frame)
            return .value(value)
        case let failed: return .fault(failed)
        }
    }

    private func word(of translation: LinearTranslation, _ address: UInt64) -> AtomicWord {
        walker.memory.word(at: translation.frame.physicalAddress | address & (pageSize - 1))
    }

    /// The translation for one access: from the TLB, else by a walk, which fills it. A fault leaves the TLB without
    /// entries for the page.
    public func translate(_ address: UInt64, _ access: LinearAccess) -> LinearResult {
        guard let address = walker.registers.effective(address) else { return .nonCanonical }
        if let cached = buffer.lookup(address, access, walker.registers) { return .translated(cached) }
        let result = walker.walk(address, access)
        switch result {
        case .translated(let translation): buffer.fill(address, translation)
        case .pageFault, .stageTwo, .outside: buffer.dropAfterFault(address)
        case .nonCanonical: break
        }
        return result
    }
}
