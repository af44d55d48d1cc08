import Interface
import IoctlScript
import LinuxKVM

/// What this machine's kernel says of itself. Answers that depend on it are read here, and nowhere assumed.
public struct KernelDescription: Sendable {
    public let release = kernelRelease
    public let capabilities: KernelCapabilities
    /// What the model is told.
    public let features: KernelFeatures
    /// Who runs the guest's code at privilege 3.
    public let guest: Guest

    public enum Guest: String, Sendable {
        /// Its accesses go through stage-2 entries.
        case processor
        /// Its accesses go through the process's mappings, and no stage-2 entry is made or tested.
        case emulator
    }

    /// Asks it, with scripts.
    public init(_ run: RealRun) throws(RealRun.Unavailable) {
        capabilities = try KernelCapabilities { script throws(RealRun.Unavailable) in
            try Self.answers(to: script, of: run)
        }
        features = KernelFeatures(capabilities, slotAddressBits: try Self.slotAddressBits(run))
        guest = try Self.guest(run)
    }

    private static func answers(to script: Script, of run: RealRun) throws(RealRun.Unavailable) -> [Answer] {
        do throws(RealRun.Failure) { return try run.answers(of: script) } catch {
            switch error {
            case .unavailable(let unavailable): throw unavailable
            case .finding(let finding):
                throw RealRun.Unavailable(reason: "the kernel did not answer: \(finding.reason)")
            }
        }
    }

    /// The most for which a slot at the end of the addresses is made.
    private static func slotAddressBits(_ run: RealRun) throws(RealRun.Unavailable) -> UInt64 {
        let widths = Array(UInt64(32)...52)
        let steps: [Step] =
            [.createVM(vm: 0, type: 0)]
            + widths.map { bits in
                .setRegion(
                    vm: 0,
                    Region(
                        slot: bits, guestAddress: (1 << bits) - 4096, size: 4096, userAddress: HostPlace(.region(0))),
                    version: 1)
            }
        var names = Names()
        (names.regions, names.vms, names.cpus) = (["r"], ["vm"], [[]])
        let answers = try answers(to: Script(lines: steps.map { Script.Line(number: 0, $0) }, names: names), of: run)
        let made = zip(widths, answers.dropFirst()).filter { $0.1.outcome == .returned(0) }
        guard let widest = made.last?.0 else { throw RealRun.Unavailable(reason: "the kernel makes no slot") }
        return widest
    }

    /// KVM's own count of the instructions that it has emulated, around a few stores.
    private static func guest(_ run: RealRun) throws(RealRun.Unavailable) -> Guest {
        let cpu = CPU(vm: 0, cpu: 0)
        let count = Step.statistics(vm: 0, cpu: 0, names: ["insn_emulation"])
        let stores: UInt64 = 8
        let steps: [Step] = [
            .host(region: 0, .anonymous, size: 4096, [.read, .write]), .createVM(vm: 0, type: 0),
            .setRegion(
                vm: 0, Region(slot: 0, guestAddress: 0x10000, size: 4096, userAddress: HostPlace(.region(0))),
                version: 1),
            .createCPU(cpu, id: 0), count,
            .guest(cpu, GuestAccess(.write, 0x10000, Repetition(count: stores, stride: 8))), count,
        ]
        var names = Names()
        (names.regions, names.vms, names.cpus) = (["r"], ["vm"], [[0]])
        let answers = try answers(to: Script(lines: steps.map { Script.Line(number: 0, $0) }, names: names), of: run)
        let counts = [answers[4], answers[6]].map { answer -> UInt64 in
            if case .decimal(let value)? = answer.fields.first?.value { value } else { 0 }
        }
        return counts[1] &- counts[0] >= stores ? .emulator : .processor
    }
}

extension KernelFeatures {
    /// What random scripts for this kernel may hold.
    var profile: RandomScripts.Profile {
        var profile = RandomScripts.Profile()
        profile.portableOnly = true
        profile.vmTypes = types
        return profile
    }
}
