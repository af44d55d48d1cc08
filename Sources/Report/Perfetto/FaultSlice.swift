import TraceAudit

/// A fault of a thread in a recording, from its first event to its last.
///
/// No event says that a fault is over. It lasts until the guest goes on (`kvm_entry`) or user space is asked
/// (`kvm_userspace_exit`) where these were recorded, else until the last event that belongs to it. It begins with
/// `kvm_page_fault`; where a host does not write that one (shadow paging outside of VMX and SVM), with the walk of the
/// guest's tables, which is a fault only if an entry or a table of KVM's comes of it.
struct FaultSlice {
    private(set) var start: UInt64 = 0
    private(set) var end: UInt64 = 0
    private let address: UInt64
    private let errorCode: UInt64?
    /// The guest's tables have been walked: another walk is another fault's.
    fileprivate var hasWalk: Bool
    fileprivate var hasRequest = false
    /// It is a fault for certain, not only a walk.
    let isCertain: Bool
    var isShown = false

    fileprivate init(address: UInt64, errorCode: UInt64?, isCertain: Bool, hasWalk: Bool) {
        self.address = address
        self.errorCode = errorCode
        self.isCertain = isCertain
        self.hasWalk = hasWalk
    }

    mutating func begin(at time: UInt64) {
        start = time
        end = time
    }

    mutating func lasts(until time: UInt64) { end = max(end, time) }

    var facts: KeyValuePairs<StaticString, PerfettoTrace.Value> {
        guard let errorCode else { return ["address": .address(address)] }
        return ["address": .address(address), "error code": .address(errorCode)]
    }

    /// What an event means for the fault that its thread is in.
    enum Role {
        case begins(FaultSlice)
        /// It belongs to the fault, and shows that it is one.
        case proves
        case continues
        case ends
        /// It says nothing about the fault, or there is none.
        case isElsewhere
    }

    static func role(of body: EventBody, in fault: FaultSlice?) -> Role {
        switch body {
        case .pageFault(let address, let code):
            .begins(FaultSlice(address: address, errorCode: code, isCertain: true, hasWalk: false))
        case .tableWalk(let address, let code):
            fault.map { $0.isCertain && !$0.hasWalk && !$0.hasRequest } ?? false
                ? .continues
                : .begins(FaultSlice(address: address, errorCode: code, isCertain: false, hasWalk: true))
        case .entryRequested(let request):
            fault.map { !$0.hasRequest } ?? false
                ? .proves
                : .begins(FaultSlice(address: request.frame << 12, errorCode: nil, isCertain: true, hasWalk: true))
        case .entrySet, .entryChanged, .fastPageFault, .splitHugePage:
            fault == nil ? .isElsewhere : .proves
        case .table, .tableWithoutFrame, .checkMMIO: fault == nil ? .isElsewhere : .proves
        case .walkedElement, .setFlag, .walkerError: fault == nil ? .isElsewhere : .continues
        case .counted(let kind): role(of: kind, in: fault)
        case .unmapRange, .ageRange, .testAge, .zapAllFast, .emulate, .mark: .ends
        }
    }

    private static func role(of kind: EventKind, in fault: FaultSlice?) -> Role {
        guard fault != nil else { return .isElsewhere }
        return switch kind {
        case .markMMIO, .handleMMIO, .asyncTry, .asyncRepeated, .asyncNotPresent, .ringPush: .proves
        default: .ends
        }
    }
}

extension FaultSlice {
    /// Takes note of an event that belongs to the fault.
    mutating func notice(_ body: EventBody) {
        switch body {
        case .tableWalk: hasWalk = true
        case .entryRequested: hasRequest = true
        default: break
        }
    }
}
