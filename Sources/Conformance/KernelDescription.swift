import Glibc
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
        var features = KernelFeatures(
            capabilities, slotAddressBits: try Self.slotAddressBits(run), largestFile: try Self.largestFile(run))
        features.slotPages = try Self.slotPages(run)
        features.swaps = hostSwaps()
        self.features = features
        do throws(RealRun.Failure) { guest = try run.emulates(privileged: false) ? .emulator : .processor } catch {
            throw RealRun.Unavailable(error)
        }
    }

    private static func answers(to script: Script, of run: RealRun) throws(RealRun.Unavailable) -> [Answer] {
        do throws(RealRun.Failure) { return try run.answers(of: script) } catch {
            throw RealRun.Unavailable(error)
        }
    }

    /// Without a limit on the kernel's memory nobody asks for more than it has.
    private static func slotPages(_ run: RealRun) throws(RealRun.Unavailable) -> UInt64 {
        guard let pages = run.refusedPages else { return .max }
        let largest = Region(
            slot: 0, guestAddress: 0, size: UInt64(Int32.max) << 12, userAddress: HostPlace(.region(0)))
        let steps: [Step] = [.createVM(vm: 0, type: 0), .setRegion(vm: 0, largest, version: 1)]
        return try answers(to: Script(steps), of: run)[1].outcome == .failed(ENOMEM) ? pages : .max
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
        let answers = try answers(to: Script(steps), of: run)
        let made = zip(widths, answers.dropFirst()).filter { $0.1.outcome == .returned(0) }
        guard let widest = made.last?.0 else { throw RealRun.Unavailable(reason: "the kernel makes no slot") }
        return widest
    }
}

extension KernelDescription {
    /// To which offset a hole can be made in a file; what is not limited within half of a process's addresses counts as not
    /// limited. Kernel: `vfs_fallocate`.
    private static func largestFile(_ run: RealRun) throws(RealRun.Unavailable) -> UInt64 {
        let place = HostPlace(.region(0))
        func reaches(_ pages: UInt64) throws(RealRun.Unavailable) -> Bool {
            let steps: [Step] = [
                .host(region: 0, .file, size: 4096, [.read, .write]),
                .map(place, length: pages << 12, [.read, .write], .object(region: 0, offset: 0), replaces: true),
                .advise(place, length: pages << 12, .remove),
            ]
            return try answers(to: Script(steps), of: run)[2].outcome == .returned(0)
        }
        var (within, beyond): (UInt64, UInt64) = (1, 1 << 34)
        if try reaches(beyond) { return UInt64(Int64.max) }
        while beyond - within > 1 {
            let middle = (within + beyond) / 2
            if try reaches(middle) { within = middle } else { beyond = middle }
        }
        return within << 12
    }
}

extension Script {
    /// Of one region and one VM.
    fileprivate init(_ steps: [Step]) {
        var names = Names()
        (names.regions, names.vms, names.cpus) = (["r"], ["vm"], [[]])
        self.init(lines: steps.map { Script.Line(number: 0, $0) }, names: names)
    }
}

extension KernelFeatures {
    /// What random scripts for this kernel may hold.
    var profile: RandomScripts.Profile {
        var profile = RandomScripts.Profile()
        profile.portableOnly = true
        profile.vmTypes = types
        profile.hasRefusedSlots = slotPages < .max
        return profile
    }
}

extension RealRun.Unavailable {
    /// A kernel that does not answer what everything else is built on.
    fileprivate init(_ failure: RealRun.Failure) {
        switch failure {
        case .unavailable(let unavailable): self = unavailable
        case .finding(let finding): self.init(reason: "the kernel did not answer: \(finding.reason)")
        }
    }
}
