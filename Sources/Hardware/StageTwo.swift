import Frames
import HostMemory

/// One of the architectures' second-stage walks.
public enum StageTwo: Sendable {
    case ept(EPTWalker)
    case npt(NPTWalker)
    case gStage(GStageWalker)

    public var memory: PhysicalMemory {
        switch self {
        case .ept(let walker): walker.memory
        case .npt(let walker): walker.memory
        case .gStage(let walker): walker.memory
        }
    }

    public func walk(_ address: GuestAddress, _ access: AccessKind) -> WalkResult {
        switch self {
        case .ept(let walker): walker.walk(address, access)
        case .npt(let walker): walker.walk(address, access)
        case .gStage(let walker): walker.walk(address, access)
        }
    }
}
