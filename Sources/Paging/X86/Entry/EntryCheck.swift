import Audit
import GuestMemory
import Synchronization
import Synchrony

/// What is asked of the entries of every x86 MMU with nobody else running. Spec: x86 section 8.
extension EntryBits {
    /// The rules about its own bits that `entry`, a present leaf, breaks: of X19, X25, X26, X40.
    /// - Parameters:
    ///   - adType: what its tree and the host make it.
    ///   - nxHugePages: no huge leaf may be executable.
    func breaches(
        ofLeaf entry: UInt64, _ level: UInt8, adType: UInt64, nxHugePages: Bool
    ) -> [(Invariant, StaticReason)] {
        var found: [(Invariant, StaticReason)] = []
        let isWritable = entry & Self.write != 0
        let mayBeWritable = entry & mmuWritable != 0
        if (isWritable && !mayBeWritable) || (mayBeWritable && entry & hostWritable == 0) {
            found.append((.x19, "W, MW and HW do not go together"))
        }
        if entry & Self.adType != adType { found.append((.x25, "a leaf's A/D type is not that of its tree")) }
        let saved = entry & (Self.savedRead | Self.savedExecute)
        if isAccessTracked(entry) {
            if saved == 0 || entry & accessed != 0 {
                found.append((.x26, "an access-tracked leaf has A, or no rights to give back"))
            }
        } else if isEPT, saved != 0 {
            found.append((.x26, "rights are set aside of a leaf that has its own"))
        }
        if nxHugePages, level > 1, isExecutable(entry) { found.append((.x40, "a huge leaf is executable")) }
        return found
    }

    /// X23, of an entry that points to a table: only the frame is its own. A may be set or not: the processor's business.
    func isProperLink(_ entry: UInt64, adDisabled: Bool) -> Bool {
        entry & ~(Self.frameMask | accessed) == link(adDisabled: adDisabled) & ~accessed
    }
}

extension VirtualMachine {
    /// X36: whether the counts of pages are those of the leaves, which are given by level.
    func countsLeaves(_ leaves: [Int]) -> Bool {
        leaves[1] == statistics.pages_4k.load(ordering: .relaxed)
            && leaves[2] == statistics.pages_2m.load(ordering: .relaxed)
            && leaves[3] == statistics.pages_1g.load(ordering: .relaxed)
    }
}
