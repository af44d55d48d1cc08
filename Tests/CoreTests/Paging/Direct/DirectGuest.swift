import Audit
import Frames
import HostMemory
import Synchrony
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// A guest on second-stage tables of the shadow MMU's (`tdp_mmu=N`). Frame `gfn(n)` shows the process's page `at(n)`.
struct DirectGuest {
    let guest: TestGuest
    let mmu: ShadowMMU

    init(
        _ kind: Kind = .ept, ramFrames: Int = 4096, thp: Bool = false, cpus: Int = 1, policy: PolicyName = .precise,
        addressSpaces: Int = 1, longestChain: Int = 1000, _ change: (inout TDPConfiguration) -> Void = { _ in }
    ) {
        var configuration = kind.configuration
        configuration.addressSpaces = addressSpaces
        change(&configuration)
        mmu = ShadowMMU(direct: configuration, longestChain: longestChain)
        guest = TestGuest(
            policy: policy, ramFrames: ramFrames, deviceFrames: 0, thp: thp, cpus: cpus, addressSpaces: addressSpaces,
            tables: .direct(mmu))
    }

    /// Hardware that there is.
    enum Kind: CaseIterable, Sendable {
        case ept, eptWithoutAD, eptOfFiveLevels, npt, nptOfFiveLevels

        var configuration: TDPConfiguration {
            var configuration = TDPConfiguration()
            configuration.format = self == .npt || self == .nptOfFiveLevels ? .npt : .ept
            configuration.levels = self == .eptOfFiveLevels || self == .nptOfFiveLevels ? 5 : 4
            configuration.accessDirty = self != .eptWithoutAD
            configuration.largestPage = .page1G
            return configuration
        }
        var prefetches: Bool { self != .eptWithoutAD }
    }

    var vm: VirtualMachine { guest.vm }
    var space: AddressSpace { guest.space }
    var statistics: Statistics { guest.vm.statistics }
    var cpu: GuestCPU { guest.cpus[0] }

    /// One fault, as the exit handler would report it.
    @discardableResult
    func fault(_ access: AccessKind, _ page: Int, present: Bool = false, reserved: Bool = false) -> FaultOutcome {
        if cpu.root == nil { mmu.loadRoot(cpu) }
        return vm.withSlots {
            mmu.handleFault(
                cpu,
                GuestFault(address: gfn(page).address, access: access, entryPresent: present, isReserved: reserved))
        }
    }

    /// The entry of `level` on the way to a page.
    func word(_ page: Int, level: UInt8 = 1) -> AtomicWord {
        var table = cpu.root!
        var at = mmu.secondStage.levels
        while at > level {
            table = HostFrame(vm.memory.entry(index(page, at), of: table).peek() >> 12 & 0xff_ffff_ffff)
            at -= 1
        }
        return vm.memory.entry(index(page, level), of: table)
    }
    private func index(_ page: Int, _ level: UInt8) -> Int { Int(gfn(page).number >> (9 * UInt64(level - 1)) & 511) }

    var pages: [ShadowPage] {
        var all: [ShadowPage] = []
        mmu.index.forEachPage { all.append($0) }
        return all
    }
    var findings: [Invariant] { mmu.checkTables().map(\.invariant) }
    func events(_ kind: Event.Kind) -> [Event] { guest.test.events(kind) }
}
