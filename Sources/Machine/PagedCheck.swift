import Audit
import Frames
import GuestMemory
import Hardware
import Paging

extension PagedCPU {
    /// X11, I-13: what the vCPU keeps of translations is backed by an entry that still grants it, or its flush is posted.
    /// At rest. Rights but W may outlive their entry until the guest flushes: it takes them away itself.
    public func checkTranslations() -> [Finding] {
        guard !hasRequest else { return [] }
        var findings: [Finding] = []
        for cached in buffer.entries {
            let frame = cached.translation.frame
            let writes = cached.translation.rights.writable && cached.translation.dirty
            guard let leaf = mmu.leaf(of: self, at: cached.first) else {
                findings.append(Finding(.x11, "a TLB holds a translation whose entry is gone", frame: frame))
                continue
            }
            let offset = cached.first >> pageShift & (leaf.level.frames - 1)
            if EntryBits.field.frame(in: leaf.entry).number + offset != frame.number {
                findings.append(Finding(.x11, "a TLB holds another frame than the entry", frame: frame))
            } else if writes, !mmu.isWritable(leaf.entry) {
                findings.append(
                    Finding(.i13, "a TLB lets the guest write what the entry no longer does", frame: frame))
            }
        }
        return findings
    }
}
