import Frames
import Synchrony

/// Blocks whose frames are neither all private nor all shared: no huge leaf may map one. Spec: x86 1.4 (`lpage_info`),
/// 3.5. Kernel: `KVM_LPAGE_MIXED_FLAG`.
extension LargePageCounts {
    /// Bit 31 of a block's count.
    static let mixed = Int32.min

    /// Sets or clears the flag of the block around `frame`. Caller holds mmu_lock for writing, or nobody sees the slot.
    func setMixed(_ frame: GuestFrame, _ level: PageLevel, _ isMixed: Bool) {
        let index = Int(frame.number / level.frames - base.number / level.frames)
        switch level {
        case .page2M: level2[index] = isMixed ? level2[index] | Self.mixed : level2[index] & ~Self.mixed
        default: level3[index] = isMixed ? level3[index] | Self.mixed : level3[index] & ~Self.mixed
        }
    }

    /// Flags the blocks in the slot of which `range` has a part and not all. Caller holds mmu_lock for writing.
    func markCut(by range: Range<GuestFrame>, in slot: MemorySlot) {
        for level in [PageLevel.page2M, .page1G] {
            for edge in [range.lowerBound, range.upperBound] where !edge.isAligned(to: level) {
                let block = edge.block(level)
                if slot.frames.contains(all: block) { setMixed(edge, level, true) }
            }
        }
    }
}

extension VirtualMachine {
    /// Looks again at every block of a slot that `frames` reaches: those at the ends by their frames, those inside are one
    /// now. Caller holds mmu_lock for writing. Kernel: `kvm_arch_post_set_memory_attributes`.
    func updateMixed(_ slot: MemorySlot, _ frames: Range<GuestFrame>) {
        guard let counts = slot.largePages else { return }
        let part = slot.frames.clamped(to: frames)
        for level in [PageLevel.page2M, .page1G] {
            var cursor = part.lowerBound
            while cursor < part.upperBound {
                let block = cursor.block(level)
                if slot.frames.contains(all: block) {
                    counts.setMixed(cursor, level, !frames.contains(all: block) && isMixed(block))
                }
                cursor = block.upperBound
            }
        }
    }

    /// For a slot that nobody sees yet. Caller holds slots_lock. Kernel: `kvm_mmu_init_memslot_memory_attributes`.
    public func initializeMixed(_ slot: MemorySlot) {
        guard hasPrivateMemory, let counts = slot.largePages else { return }
        for level in [PageLevel.page2M, .page1G] {
            var cursor = slot.baseFrame
            while cursor < slot.frames.upperBound {
                let block = cursor.block(level)
                if slot.frames.contains(all: block) { counts.setMixed(cursor, level, isMixed(block)) }
                cursor = block.upperBound
            }
        }
    }

    private func isMixed(_ block: Range<GuestFrame>) -> Bool {
        let attributes = privateMemory.attributes
        return !attributes.areAll(block, isPrivate: true) && !attributes.areAll(block, isPrivate: false)
    }
}

extension GuestFrame {
    /// The block of `level` around the frame.
    fileprivate func block(_ level: PageLevel) -> Range<GuestFrame> {
        let first = aligned(to: level)
        return first..<GuestFrame(first.number + level.frames)
    }
}

extension Range where Bound == GuestFrame {
    fileprivate func contains(all other: Range<GuestFrame>) -> Bool {
        lowerBound <= other.lowerBound && other.upperBound <= upperBound
    }
}
