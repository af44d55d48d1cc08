/// What RISC-V KVM of this baseline does and should not. All off: the strict behaviour. Spec: arches 2.2, 2.3, 12.6.
public struct GStageQuirks: Sendable, Equatable {
    /// A fault that the retry check refuses marks its page as used, dirty if it was writable, although nothing was
    /// mapped. Spec: q.rv.retryMarksUsed.
    public var retryMarksUsed = false
    /// A 4 KiB leaf wanted below a huge one fails KVM_RUN with EEXIST, page marked as used, instead of splitting the
    /// huge leaf. Spec: q.rv.eexistToUser.
    public var existingLeafFails = false
    /// Unmapping steps by the size at which each walk ends, unaligned: what lies behind a hole may be stepped over, a
    /// huge leaf that is covered in part stays, and so do empty tables. Spec: q.rv.unmapSkip, q.rv.tableLeak.
    public var unmapSkips = false

    public init(retryMarksUsed: Bool = false, existingLeafFails: Bool = false, unmapSkips: Bool = false) {
        self.retryMarksUsed = retryMarksUsed
        self.existingLeafFails = existingLeafFails
        self.unmapSkips = unmapSkips
    }
}
