/// A line that the program driving KVM wrote into `trace_marker`: the ground truth of what it did.
///
/// Only lines that begin with `PROBE` are read; any other mark is `.other`.
enum ProbeMark: Equatable, Sendable {
    case scenario
    /// `phase`; `closesMachine` for `phase vm close`.
    case phase(closesMachine: Bool)
    case setRegion(SlotRequest)
    case setRegionResult(Int64)
    case guest(GuestRun)
    case guestDone(vcpu: Int64, result: Int64, exit: Int64)
    case getDirtyLog(slot: UInt64)
    case getDirtyLogResult(result: Int64, dirty: UInt64)
    /// A `PROBE` line of another kind (a host action).
    case action
    case other
}

/// `PROBE set_region`: one `KVM_SET_USER_MEMORY_REGION`. Addresses and size in bytes.
struct SlotRequest: Equatable, Sendable {
    var slot: UInt64
    var flags: UInt64
    var guestAddress: UInt64
    var size: UInt64
    var hostAddress: UInt64
}

/// `PROBE guest`: `count` accesses of eight bytes, `stride` bytes apart.
struct GuestRun: Equatable, Sendable {
    enum Operation: String, Sendable, Codable {
        case read = "r"
        case write = "w"
        case lockedIncrement = "l"
    }
    var vcpu: Int64
    var operation: Operation
    var guestAddress: UInt64
    var count: UInt64
    var stride: UInt64

    var writes: Bool { operation != .read }
}

extension ProbeMark {
    init(_ body: ByteCursor) {
        var cursor = body
        guard cursor.skip("PROBE ") else {
            self = .other
            return
        }
        if cursor.skip("scenario ") {
            self = .scenario
        } else if cursor.skip("phase ") {
            self = .phase(closesMachine: cursor.starts(with: "vm close"))
        } else if cursor.skip("set_region ") {
            self = Self.setRegion(cursor)
        } else if cursor.skip("guest done ") {
            self = Self.guestDone(cursor)
        } else if cursor.skip("guest ") {
            self = Self.guest(cursor)
        } else if cursor.skip("get_dirty_log ") {
            self = Self.dirtyLog(cursor)
        } else {
            self = .action
        }
    }

    /// The value behind ` key=`, decimal or `0x` hexadecimal, wherever it stands.
    private static func number(_ key: StaticString, in body: ByteCursor) -> Int64? {
        guard var cursor = value(key, in: body) else { return nil }
        if cursor.starts(with: "0x") {
            guard let value = cursor.hexadecimal() else { return nil }
            return Int64(bitPattern: value)
        }
        return cursor.signedDecimal()
    }

    private static func value(_ key: StaticString, in body: ByteCursor) -> ByteCursor? {
        var cursor = body
        while !cursor.isAtEnd {
            cursor.skipSpaces()
            var word = cursor.word()
            if word.skip(key), word.skip("=") { return word }
        }
        return nil
    }

    private static func unsigned(_ key: StaticString, in body: ByteCursor) -> UInt64? {
        number(key, in: body).map { UInt64(bitPattern: $0) }
    }

    private static func setRegion(_ body: ByteCursor) -> ProbeMark {
        if let result = number("ret", in: body) { return .setRegionResult(result) }
        guard let slot = unsigned("slot", in: body), let flags = unsigned("flags", in: body),
            let guest = unsigned("gpa", in: body), let size = unsigned("size", in: body),
            let host = unsigned("hva", in: body)
        else { return .action }
        return .setRegion(
            SlotRequest(slot: slot, flags: flags, guestAddress: guest, size: size, hostAddress: host))
    }

    private static func guest(_ body: ByteCursor) -> ProbeMark {
        guard let vcpu = number("vcpu", in: body), let operation = value("op", in: body),
            let kind = GuestRun.Operation(rawValue: operation.text), let address = unsigned("gpa", in: body),
            let count = unsigned("count", in: body), let stride = unsigned("stride", in: body)
        else { return .action }
        return .guest(
            GuestRun(vcpu: vcpu, operation: kind, guestAddress: address, count: count, stride: stride))
    }

    private static func guestDone(_ body: ByteCursor) -> ProbeMark {
        guard let vcpu = number("vcpu", in: body), let result = number("ret", in: body),
            let exit = number("exit", in: body)
        else { return .action }
        return .guestDone(vcpu: vcpu, result: result, exit: exit)
    }

    private static func dirtyLog(_ body: ByteCursor) -> ProbeMark {
        if let result = number("ret", in: body) {
            return .getDirtyLogResult(result: result, dirty: unsigned("dirty", in: body) ?? 0)
        }
        return unsigned("slot", in: body).map(ProbeMark.getDirtyLog) ?? .action
    }
}
