import Frames

/// v13: entries say nothing about pages, so nothing is done for them. Spec: x86 3.12, I-4.
public struct Precise: ReferencePolicy {
    @inlinable public init() {}
    @inlinable @inline(__always)
    public func leafRemoved(_ frame: HostFrame, counted: Bool, accessed: Bool, dirty: Bool) {}
    @inlinable @inline(__always)
    public func dirtyCleared(_ frame: @autoclosure () -> HostFrame, counted: @autoclosure () -> Bool) {}
}
