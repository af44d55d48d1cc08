/// Lends `object` to `body` without counting a reference to it. Only where somebody else keeps the object meanwhile: a
/// constant property of an object that is itself kept.
///
/// On the fault path a reference counted up and down is two locked instructions on a line that all vCPUs write.
@inlinable @inline(__always)
public func lending<Object: AnyObject, Result>(_ object: Object, _ body: (Object) -> Result) -> Result {
    Unmanaged.passUnretained(object)._withUnsafeGuaranteedRef(body)
}
