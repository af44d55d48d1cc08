import Audit
import CSchedule
import Frames
import HostMemory
import Paging
import Synchronization
import Synchrony
import Testing

@testable import GuestMemory
@testable import Machine

/// A VM on a host of its own, for tests of the generic half with a real MMU. When it goes it takes the VM and the
/// process down and expects that KVM holds nothing.
///
/// Guest frame `gfn(n)` shows the process's page `at(n)` in the slots that `setSlot` makes; both are 2 MiB congruent.
final class TestGuest: @unchecked Sendable {
    // Unchecked: immutable but for what the test itself changes before and after other threads run.
    let test: TestHost
    let space: AddressSpace
    let tables: StageTwoTables
    let vm: VirtualMachine
    let cpus: [GuestCPU]
    let policy: PolicyName
    /// A guest that was caught leaving rubbish says so here; tests that break rules on purpose expect them.
    var expectedFindings = 0
    /// Free frames before the process had any memory.
    let framesAtStart: Int
    private var isDown = false

    init(
        _ architecture: Architecture = .x86TDP, policy: PolicyName = .precise, ramFrames: Int = 384,
        deviceFrames: Int = 64, thp: Bool = false, unsafe: Bool = false, cpus count: Int = 1, keepsEvents: Bool = true,
        reclaims: Bool = false, addressSpaces: Int = 1, type: VirtualMachineType = .standard,
        swap: SwapDevice? = nil, tables special: StageTwoTables? = nil, before: (VirtualMachine) -> Void = { _ in }
    ) {
        test = TestHost(
            ramFrames: ramFrames, deviceFrames: deviceFrames, thp: thp, keepsEvents: keepsEvents, swap: swap,
            reclaims: reclaims)
        framesAtStart = test.memory.freeFrames
        space = test.space()
        tables = special ?? architecture.makeTables(addressSpaces: addressSpaces)
        self.policy = policy
        vm = VirtualMachine(
            addressSpace: space, mmu: tables.mmu, policy: policy.kind, allowUnsafeMappings: unsafe,
            type: type)
        before(vm)
        var made: [GuestCPU] = []
        for number in 0..<count { made.append(GuestCPU(number: number, vm: vm, tables: tables)) }
        cpus = made
        for cpu in made { #expect(throws: Never.self) { try vm.create(cpu) } }
    }

    /// Ends the VM and its process.
    func takeDown() {
        guard !isDown else { return }
        isDown = true
        vm.destroy()
        test.journal.checkQuiescent()
        space.exit()
    }

    deinit {
        takeDown()
        let findings = test.journal.findings
        #expect(findings.count == expectedFindings, "findings: \(findings)")
    }

    // MARK: Slots

    func region(
        _ id: UInt32 = 0, guest: Int = 0, pages: Int, host: Int? = nil, log: Bool = false, readOnly: Bool = false
    ) -> MemoryRegion {
        MemoryRegion(
            slot: id, flags: SlotFlags(logDirtyPages: log, readOnly: readOnly),
            guestAddress: gfn(guest).address, size: UInt64(pages) * pageSize, userAddress: at(host ?? guest))
    }

    func setSlot(
        _ id: UInt32 = 0, guest: Int = 0, pages: Int, host: Int? = nil, log: Bool = false, readOnly: Bool = false
    ) throws(Errno) {
        try vm.setMemoryRegion(region(id, guest: guest, pages: pages, host: host, log: log, readOnly: readOnly))
    }

    func deleteSlot(_ id: UInt32 = 0) throws(Errno) {
        try vm.setMemoryRegion(MemoryRegion(slot: id, guestAddress: GuestAddress(0), size: 0, userAddress: at(0)))
    }

    /// Anonymous memory of `pages` pages at `at(first)`, shown by a slot.
    func addMemory(_ first: Int = 0, _ pages: Int, log: Bool = false, readOnly: Bool = false) throws {
        try space.mapPages(first, pages)
        try setSlot(guest: first, pages: pages, log: log, readOnly: readOnly)
    }

    // MARK: The guest

    func load(_ page: Int, cpu: Int = 0) -> AccessResult { cpus[cpu].access(.read, gfn(page).address) }
    @discardableResult
    func store(_ page: Int, _ value: UInt64, cpu: Int = 0) -> AccessResult {
        cpus[cpu].access(.write, gfn(page).address, value: value)
    }

    func leaf(_ page: Int) -> StageTwoLeaf? {
        var found: StageTwoLeaf?
        vm.mmu.forEachLeaf { leaf in
            let start = leaf.guestFrame.number
            if gfn(page).number >= start && gfn(page).number < start + leaf.level.frames { found = leaf }
        }
        return found
    }

    var leafCount: Int {
        var count = 0
        vm.mmu.forEachLeaf { _ in count += 1 }
        return count
    }

    func frame(_ page: Int) -> HostFrame? { space.translate(at(page))?.frame }

    // MARK: Rules at rest

    /// The rules that hold when nothing is in flight; what they find appears when the guest goes.
    func check() {
        Checks(vm: vm, tables: tables, cpus: cpus, policy: policy).run(test.journal)
    }
}

/// The guest frame that shows `at(page)`.
func gfn(_ page: Int) -> GuestFrame { GuestFrame(UInt64(0x200 + page)) }

/// What a translation gave, and what it owned while it was held.
struct Answer: Equatable {
    var error: TranslationError?
    var frame: HostFrame?
    var writable = false
    /// References by the ledger.
    var references = 0

    static func failed(_ error: TranslationError) -> Answer { Answer(error: error) }
    /// A counted page: one reference.
    static func page(_ frame: HostFrame?, writable: Bool) -> Answer {
        Answer(frame: frame, writable: writable, references: 1)
    }
    /// Found by the PFN walk: nothing is owned.
    static func mapped(_ frame: HostFrame?, writable: Bool) -> Answer { Answer(frame: frame, writable: writable) }
}

extension TestGuest {
    var heldReferences: Int { test.journal.holdings.reduce(0) { $0 + $1.references } }

    /// One fault-in, released unused. Expects that the page's count moves by what is owned, and comes back.
    func faultIn(
        _ page: Int, write: Bool = false, noWait: Bool = false, interruptible: Bool = false
    ) -> Answer {
        vm.withSlots {
            let slot = vm.slot(containing: gfn(page))
            switch vm.faultIn(
                gfn(page), slot: slot, write: write, noWait: noWait, interruptible: interruptible,
                snapshot: vm.snapshot())
            {
            case .failed(let error, _):
                #expect(heldReferences == 0)
                return .failed(error)
            case .frame(let faulted):
                let frame = faulted.frame
                let answer = Answer(frame: frame, writable: faulted.isWritable, references: heldReferences)
                let owns = faulted.ownsReference
                // From here on the test's own looks: no interposer belongs between them.
                let task = fl_current()
                fl_attach(nil)
                defer { fl_attach(task) }
                let during = test.memory.inspect(frame)?.headReferenceCount
                faulted.releaseUnused()
                let after = test.memory.inspect(frame)?.headReferenceCount
                #expect(owns == (answer.references == 1))
                if let during, let after { #expect(during - after == answer.references) }
                #expect(heldReferences == 0)
                return answer
            }
        }
    }

    /// The generic lookup alone. Kernel: `kvm_follow_pfn`.
    func follow(_ page: Int, write: Bool = false, wantsWritable: Bool = false, noWait: Bool = false) -> Answer {
        vm.withSlots {
            var request = FollowRequest(frame: gfn(page), write: write, holder: .framePage)
            request.wantsWritable = wantsWritable
            request.noWait = noWait
            switch vm.follow(request, in: vm.slot(containing: gfn(page))) {
            case .failed(let error): return .failed(error)
            case .mapped(let frame, let writable, _, _):
                return Answer(frame: frame, writable: writable, references: heldReferences)
            case .page(let reference, let writable):
                let answer = Answer(frame: reference.frame, writable: writable, references: heldReferences)
                reference.releaseUnused()
                return answer
            }
        }
    }
}

extension Array where Element == UInt64 {
    /// The pages whose bits are set.
    var pages: [Int] {
        indices.flatMap { word in (0..<64).filter { self[word] >> UInt64($0) & 1 == 1 }.map { word * 64 + $0 } }
    }
}

/// Raised by one thread, seen by another.
final class Flag: Sendable {
    private let value = Atomic<Bool>(false)
    var isRaised: Bool { value.load(ordering: .acquiring) }
    func raise() { value.store(true, ordering: .releasing) }
}
