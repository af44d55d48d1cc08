/// A line that the program driving KVM wrote into `trace_marker`: the ground truth of what it did.
///
/// Only lines that begin with `PROBE` are read; any other mark is `.other`.
package enum ProbeMark: Equatable, Sendable {
    case scenario
    /// `phase`; `closesMachine` for `phase vm close`.
    case phase(name: String, closesMachine: Bool)
    case setRegion(SlotRequest)
    case setRegionResult(Int64)
    case guest(GuestRun)
    case guestDone(vcpu: Int64, result: Int64, exit: Int64)
    case getDirtyLog(slot: UInt64)
    case getDirtyLogResult(result: Int64, dirty: UInt64)
    /// `line N`, `line N done`: around a call of a script, by its number among the script's, from 0.
    case line(Int, isDone: Bool)
    /// A `PROBE` line of another kind (a host action).
    case action
    case other
}

/// `PROBE set_region`: one `KVM_SET_USER_MEMORY_REGION`. Addresses and size in bytes.
package struct SlotRequest: Equatable, Sendable {
    package var slot: UInt64
    package var flags: UInt64
    package var guestAddress: UInt64
    package var size: UInt64
    package var hostAddress: UInt64
}

/// `PROBE guest`: `count` accesses of eight bytes, `stride` bytes apart.
package struct GuestRun: Equatable, Sendable {
    package enum Operation: String, Sendable, Codable {
        case read = "r"
        case write = "w"
        case lockedIncrement = "l"
    }
    package var vcpu: Int64
    package var operation: Operation
    package var guestAddress: UInt64
    package var count: UInt64
    package var stride: UInt64

    package var writes: Bool { operation != .read }
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
            let closes = cursor.starts(with: "vm close")
            self = .phase(name: cursor.text, closesMachine: closes)
        } else if cursor.skip("line ") {
            self = Self.line(cursor)
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

    private static func line(_ body: ByteCursor) -> ProbeMark {
        let words = body.text.split(separator: " ")
        guard let number = words.first.flatMap({ Int($0) }) else { return .action }
        return .line(number, isDone: words.dropFirst() == ["done"])
    }

    private static func setRegion(_ body: ByteCursor) -> ProbeMark {
        if let result = body.number(of: "ret") { return .setRegionResult(result) }
        guard let slot = body.unsigned(of: "slot"), let flags = body.unsigned(of: "flags"),
            let guest = body.unsigned(of: "gpa"), let size = body.unsigned(of: "size"),
            let host = body.unsigned(of: "hva")
        else { return .action }
        return .setRegion(
            SlotRequest(slot: slot, flags: flags, guestAddress: guest, size: size, hostAddress: host))
    }

    private static func guest(_ body: ByteCursor) -> ProbeMark {
        guard let vcpu = body.number(of: "vcpu"), let operation = body.value(of: "op"),
            let kind = GuestRun.Operation(rawValue: operation.text), let address = body.unsigned(of: "gpa"),
            let count = body.unsigned(of: "count"), let stride = body.unsigned(of: "stride")
        else { return .action }
        return .guest(
            GuestRun(vcpu: vcpu, operation: kind, guestAddress: address, count: count, stride: stride))
    }

    private static func guestDone(_ body: ByteCursor) -> ProbeMark {
        guard let vcpu = body.number(of: "vcpu"), let result = body.number(of: "ret"),
            let exit = body.number(of: "exit")
        else { return .action }
        return .guestDone(vcpu: vcpu, result: result, exit: exit)
    }

    private static func dirtyLog(_ body: ByteCursor) -> ProbeMark {
        if let result = body.number(of: "ret") {
            return .getDirtyLogResult(result: result, dirty: body.unsigned(of: "dirty") ?? 0)
        }
        return body.unsigned(of: "slot").map(ProbeMark.getDirtyLog) ?? .action
    }
}
