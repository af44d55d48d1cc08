import Frames

/// An access to a linear address. Whether it is a user access, CPL says.
public struct LinearAccess: Sendable, Equatable {
    public var kind: AccessKind
    /// The processor accesses a structure of its own (descriptor tables, the task state) through its linear address: a
    /// supervisor access at any CPL, to which EFLAGS.AC gives nothing.
    public var isImplicit: Bool

    public init(_ kind: AccessKind, implicit: Bool = false) {
        self.kind = kind
        isImplicit = implicit
    }

    public static let read = LinearAccess(.read)
    public static let write = LinearAccess(.write)
    public static let execute = LinearAccess(.execute)
}

/// What the entries of one translation permit together, before registers are asked. Source: Intel SDM volume 3,
/// "Determination of access rights".
public struct LinearRights: Sendable, Equatable {
    /// U/S is 1 in every entry: a user-mode address.
    public var user: Bool
    /// R/W is 1 in every entry.
    public var writable: Bool
    /// XD is 0 in every entry.
    public var executable: Bool
    /// Of the leaf.
    public var protectionKey: UInt8

    public init(user: Bool, writable: Bool, executable: Bool, protectionKey: UInt8 = 0) {
        self.user = user
        self.writable = writable
        self.executable = executable
        self.protectionKey = protectionKey
    }

    public static let all = LinearRights(user: true, writable: true, executable: true)
}

extension PagingRegisters {
    func isUser(_ access: LinearAccess) -> Bool { privilegeLevel == 3 && !access.isImplicit }

    /// Whether the processor in this state lets the access through. With paging off, always.
    public func permits(_ access: LinearAccess, _ rights: LinearRights) -> Bool {
        guard mode != .off else { return true }
        if access.kind == .execute {
            guard rights.executable || !noExecute else { return false }
            return isUser(access) ? rights.user : !(rights.user && supervisorExecutionPrevention)
        }
        guard !deniedByKey(access, rights) else { return false }
        if isUser(access) {
            return rights.user && (access.kind == .read || rights.writable)
        }
        if rights.user, supervisorAccessPrevention, access.isImplicit || !alignmentCheck { return false }
        return access.kind == .read || rights.writable || !writeProtect
    }

    /// Whether the page's protection key forbids the access, whatever else does.
    func deniedByKey(_ access: LinearAccess, _ rights: LinearRights) -> Bool {
        guard protectionKeys, rights.user, access.kind != .execute else { return false }
        let accessDisabled = pkru >> (2 * UInt32(rights.protectionKey)) & 1 != 0
        let writeDisabled = pkru >> (2 * UInt32(rights.protectionKey) + 1) & 1 != 0
        return accessDisabled
            || (writeDisabled && access.kind == .write && (isUser(access) || writeProtect))
    }

    /// The error code's bits that describe the access, not what it found: W, U and I/D.
    func errorBits(of access: LinearAccess) -> UInt32 {
        var code: UInt32 = 0
        if access.kind == .write { code |= PageFault.write }
        if isUser(access) { code |= PageFault.user }
        if access.kind == .execute, noExecute || supervisorExecutionPrevention { code |= PageFault.fetch }
        return code
    }
}
