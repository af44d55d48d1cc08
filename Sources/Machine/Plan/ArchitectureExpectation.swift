// Expectations that hold on some architectures only. KVM's answer to one access is not the same everywhere: a guest
// write through a read-only PFN-mapped entry is emulated on x86 and ends KVM_RUN with -EFAULT on RISC-V (Spec: generic
// section 7). One plan runs on all of them, so it carries all of their answers.

/// Architectures of the model, as a set.
public struct ArchitectureSet: OptionSet, Sendable, Hashable {
    public let rawValue: UInt8
    @inlinable public init(rawValue: UInt8) { self.rawValue = rawValue }
    @inlinable public init(_ architecture: Architecture) { rawValue = 1 << architecture.rawValue }

    public static let x86: ArchitectureSet = [
        ArchitectureSet(.x86TDP), ArchitectureSet(.x86Shadow), ArchitectureSet(.x86TDPLegacy),
    ]
    public static let riscv: ArchitectureSet = [ArchitectureSet(.riscvSv39x4), ArchitectureSet(.riscvSv48x4)]
    public static let all: ArchitectureSet = [.x86, .riscv]

    @inlinable public func contains(_ architecture: Architecture) -> Bool {
        contains(ArchitectureSet(architecture))
    }
}

/// What a step must give on some architectures.
public struct ArchitectureExpectation: Sendable, Equatable {
    public var architectures: ArchitectureSet
    public var expectation: StepExpectation
    public init(_ architectures: ArchitectureSet, _ expectation: StepExpectation) {
        self.architectures = architectures
        self.expectation = expectation
    }
}

extension StepPlan {
    /// What this step must give on `architecture`.
    public func expectation(on architecture: Architecture) -> StepExpectation {
        for exception in exceptions where exception.architectures.contains(architecture) {
            return exception.expectation
        }
        return expectation
    }
}

extension Architecture {
    /// Bits of a guest physical address that the second stage translates. EPT with 4 levels: 48 (Intel SDM 3,
    /// 29.3.2). Sv39x4 and Sv48x4 add two bits to their virtual widths (RISC-V privileged, "Two-Stage Address
    /// Translation"). Spec: x86 1.1, arches 2.1.
    public var guestAddressBits: Int {
        switch self {
        case .x86TDP, .x86TDPLegacy: 48
        case .riscvSv39x4: 41
        case .riscvSv48x4: 50
        // The guest's tables map its memory at the same linear address, in the lower half of four levels; its own tables
        // lie above.
        case .x86Shadow: 46
        }
    }
}
