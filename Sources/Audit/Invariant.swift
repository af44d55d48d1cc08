/// The numbered rules that a run or a recording is checked against. The raw value's hundreds tell the family:
/// 1xx generic `I-n`, 2xx x86 `Xn`, 3xx RISC-V `RV-n`. Spec: generic section 8, x86 section 8, arches 2.4.
/// 4xx `D-n`: what a host driver owes the memory management; the project's own, see "Writing a driver" in the documentation.
/// 5xx `LOG-n`: what those who use the dirty log owe; the project's own too.
public enum Invariant: UInt16, Sendable, CaseIterable {
    case i1 = 101
    case i2, i3, i4, i5, i6, i7, i8, i9, i10, i11, i12, i13, i14, i15, i16, i17, i18, i19, i20, i21, i22
    case i23, i24, i25, i26, i27, i28, i29
    case x7 = 207
    case x11 = 211
    case x12 = 212
    case x17 = 217
    case x18 = 218
    case x19 = 219
    case x20 = 220
    case x21 = 221
    case x22 = 222
    case x23 = 223
    case x24 = 224
    case x25 = 225
    case x26 = 226
    case x27 = 227
    case x28 = 228
    case x29 = 229
    case x30 = 230
    case x31 = 231
    case x32 = 232
    case x33 = 233
    case x34 = 234
    case x35 = 235
    case x36 = 236
    case x38 = 238
    case x39 = 239
    case x40 = 240
    case x41 = 241
    case x42 = 242
    case x44 = 244
    case x45 = 245
    case x46 = 246
    case x48 = 248
    case x49 = 249
    case x50 = 250
    case x51 = 251
    case x52 = 252
    case x53 = 253
    case x54 = 254
    case x55 = 255
    case x56 = 256
    case x57 = 257
    case x58 = 258
    case x59 = 259
    case x60 = 260
    case x61 = 261
    case x62 = 262
    case x63 = 263
    case rv1 = 301
    case rv2, rv3, rv4, rv5, rv6, rv7
    /// A driver's contract. Kernel: the rules of `vm_operations_struct` and `vmf_insert_pfn`, which nobody checks.
    case d1 = 401
    /// A consumer's contract, which users.md P5 to P9 tell the breaches of.
    case log1 = 501

    /// The rule's name in the specification: `I-6`, `X19`, `RV-2`; `D-1`, `LOG-1`.
    public var family: StaticString {
        switch rawValue / 100 {
        case 1: "I-"
        case 2: "X"
        case 3: "RV-"
        case 4: "D-"
        default: "LOG-"
        }
    }
    public var number: Int { Int(rawValue % 100) }

    /// One sentence.
    public var statement: StaticString {
        switch self {
        case .i1: "when KVM is idle it owns no page reference"
        case .i2: "nothing is put that was not got; a page with count 0 is never touched"
        case .i3: "references are put and pins are unpinned"
        case .i4: "no page frame is derived from a stage-2 entry"
        case .i5: "a PFN mapping takes no reference and never fails because of the page's count"
        case .i6: "no stale entry: after an invalidation started, nothing maps the old page"
        case .i7: "an entry equals the primary translation when it is installed, and is writable only if that is"
        case .i8: "the invalidation snapshot is taken before the translation"
        case .i9: "invalidations in progress are those started and not ended"
        case .i10: "a fault's page is released dirty or accessed only under mmu_lock"
        case .i11: "a page the guest can write was marked dirty when the entry was made"
        case .i12: "a write to a logged slot is in the dirty log"
        case .i13: "after a flush no vCPU uses the old translation"
        case .i14: "the flags of reserved pages are never changed"
        case .i15: "the page output is defined on every path"
        case .i16: "a PFN mapping is pinned only with allow_unsafe_mappings"
        case .i17: "no fault's reference outlives the fault"
        case .i18: "an error value never reaches an entry"
        case .i19: "needs-IO only with no-wait; signal-pending only with a signal"
        case .i20: "both sets of slots agree at rest, without overlap, and generations grow"
        case .i21: "a deleted slot has no entries"
        case .i22: "a slot's memory lies in user space"
        case .i23: "read-only memory is never written"
        case .i24: "a frame cache holds no reference"
        case .i25: "a guest_memfd binding belongs to one slot"
        case .i26: "prefetch never changes an existing entry"
        case .i27: "each reset ring entry is consumed once"
        case .i28: "after the VM is gone nothing is left"
        case .i29: "the page of a read-only translation is the one in the primary table"
        case .x7: "a fault that is to be tried again leaves its page unmarked"
        case .x11: "after a notifier's start no root and no TLB maps the range"
        case .x12: "nothing is installed for a frame whose invalidation is in progress"
        case .x17: "the processor's APIC access page is the one that is mapped, or a reload is pending"
        case .x18: "an entry is shadow-present exactly if bit 11 is set"
        case .x19: "a leaf's writability is one of the four legal states"
        case .x20: "whether the host may write changes only with the frame unchanged, and in the TDP MMU only to yes"
        case .x21: "a present leaf never changes its frame in place"
        case .x22: "a huge leaf is aligned"
        case .x23: "no reserved bit is set"
        case .x24: "on EPT every entry suppresses #VE"
        case .x25: "a leaf's A/D type is what its tree and the host make it"
        case .x26: "an access-tracked leaf has no A, and rights to give back"
        case .x27: "an MMIO entry is used only in its own generation, and never while slots change"
        case .x28: "a frozen entry is never overwritten"
        case .x29: "a table has exactly one parent"
        case .x30: "a table is freed only when it maps nothing any more"
        case .x31: "who shares mmu_lock changes an entry by compare-exchange"
        case .x32: "a root has a reference of each that holds it, a valid one also of the MMU"
        case .x33: "a root becomes invalid under mmu_lock, together with the request to leave it"
        case .x34: "a root that is to be emptied is held until it is"
        case .x35: "no vCPU enters the guest on an obsolete root"
        case .x36: "the page counts equal the leaves"
        case .x38: "a huge leaf lies in its slot, congruent, and the host maps as much"
        case .x39: "no writable huge leaf in a logged slot"
        case .x40: "where huge pages are not executable, no huge leaf is"
        case .x41: "the counts of reasons against huge pages are the edges, the tracked frames and the shadowed tables"
        case .x42: "the count of tables that execution alone keeps from being huge pages is that of their list"
        case .x44: "a writable leaf of a logged slot is in the log"
        case .x45: "where the processor logs writes, what has D is in a log"
        case .x46: "a nested guest's leaves are protected by W where the log is hardware's"
        case .x48: "the guest can't write a frame that is tracked, nor a table that is shadowed, unheard"
        case .x49: "only a page that shadows a lowest guest table is unsync"
        case .x50: "every entry on the way to an unsync page is marked"
        case .x51: "after the guest's flush no entry gives more than the guest's own"
        case .x52: "one guest table has one current page for each role"
        case .x53: "the reverse maps hold exactly the leaves, and a page knows exactly the entries that point to it"
        case .x54: "a page is linked only after the guest's entry was read again"
        case .x55: "indirect_shadow_pages is the number of pages that shadow guest entries"
        case .x56: "a shadow page is freed only after a flush that waited for who walks it"
        case .x57: "synchronising changes no frame, and gives only rights that the guest's entry has"
        case .x58: "a leaf in the place of a table lets the guest write what any leaf would"
        case .x59: "a prefetch never replaces a present entry"
        case .x60: "an entry that is synchronised is accessed"
        case .x61: "n_used is the number of shadow pages, within the limit"
        case .x62: "no page of an earlier generation can be found"
        case .x63: "the lock order holds and nobody sleeps under a spinning lock"
        case .rv1: "a G-stage leaf has V, U, R and X, and no PBMT, RSW or N"
        case .rv2: "a G-stage leaf is aligned to its level"
        case .rv3: "no entry maps beyond the guest's address bits"
        case .rv4: "the D bit is never cleared; logging uses W"
        case .rv5: "a page is put exactly once, under mmu_lock"
        case .rv6: "a page is marked dirty only with a writable leaf"
        case .rv7: "a change is followed by a fence before mmu_lock is dropped"
        case .d1: "a driver maps only frames of its own, where it was asked to, and gives none back that is mapped"
        case .log1: "the image of a migration or a snapshot is the guest's memory at the stop"
        }
    }
}
