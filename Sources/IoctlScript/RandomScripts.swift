import CKVMInterface
import SeededRandom

/// Random scripts, the same for the same seed everywhere: half of the steps are accesses of the guest and changes to
/// memory that a slot shows; the rest are KVM's calls, with many edge values and in every wrong order.
public struct RandomScripts {
    var random: SplitMix
    private let profile: Profile

    /// What a kernel is to be asked.
    public struct Profile: Sendable {
        /// Kinds of memory that only the model has are left out.
        public var portableOnly = false
        /// Types of VMs, a bit for each, of which the first of a script has one.
        public var vmTypes: UInt64 = 3
        /// The largest slot is asked for now and then: there is no memory for its tables.
        public var hasRefusedSlots = false
        /// What can be compared with a recording: one VM with one vCPU, whose guest makes accesses of whole words and no others,
        /// no files, of whose large folios the notifiers hear, and no forks, after which a page may be copied or not.
        public var isTraced = false
        public init() {}
    }
    private(set) var names = Names()
    private var lines: [Script.Line] = []
    /// Slots as they would be if every call had succeeded.
    var slots: [Region] = []
    var regionSizes: [UInt64] = []
    private var regionKinds: [HostKind] = []
    private var running = [0]
    /// Regions behind which there is an object.
    var objects: [Int] { regionKinds.indices.filter { regionKinds[$0].hasObject } }

    public init(seed: UInt64, _ profile: Profile = Profile()) {
        random = SplitMix(seed: seed)
        self.profile = profile
    }

    /// The script of this seed: 60 to 260 steps.
    public mutating func script() -> Script {
        lines = []
        let steps = 60 + below(200)
        begin()
        while lines.count < steps { add(step(), process: process()) }
        return Script(lines: lines, names: names).renumbered
    }

    // MARK: Drawing

    mutating func below(_ bound: Int) -> Int { Int(random.next() % UInt64(bound)) }
    mutating func chance(_ percent: Int) -> Bool { below(100) < percent }
    mutating func pick<T>(_ values: [T]) -> T { values[below(values.count)] }

    private mutating func add(_ step: Step?, process: Int = 0) {
        guard let step else { return }
        if case .exit = step {
            guard process != 0 else { return }
            running.removeAll { $0 == process }
        }
        lines.append(Script.Line(number: 0, process: process, step))
    }

    private mutating func process() -> Int { running.count > 1 && chance(8) ? pick(running) : 0 }

    // MARK: The beginning, mostly sane

    private mutating func begin() {
        for _ in 0..<1 + below(3) { add(makeHost()) }
        add(makeVM(type: chance(20) ? profile.vmTypes >> 1 & 1 : 0))
        if chance(15), !profile.isTraced { add(makeVM(type: UInt64(below(3)))) }
        if chance(20) {
            add(.enableCapability(vm: 0, capability: ringCapability(), flags: 0, arguments: [ringBytes()]))
        }
        if chance(25) {
            let bits = UInt64(1 + 2 * below(2))
            let manual = UInt64(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
            add(.enableCapability(vm: 0, capability: manual, flags: 0, arguments: [bits]))
        }
        if chance(90) { add(makeCPU(vm: 0, id: 0)) }
        for _ in 0..<1 + below(2) { add(saneRegion()) }
    }

    private mutating func makeHost() -> Step {
        let common: [HostKind] = [.anonymous, .anonymous, .memfd, .sharedAnonymous]
        let kinds = HostKind.allCases.filter { ($0.isPortable || !profile.portableOnly) && $0 != .none }
        var kind = chance(60) ? pick(common) : pick(kinds)
        // Pools are the host's affair, and large.
        if kind == .hugetlb || kind == .hugetlbPrivate, profile.portableOnly || chance(80) { kind = .anonymous }
        if profile.isTraced, kind == .file || kind == .filePrivate { kind = .memfd }
        let isHuge = kind == .hugetlb || kind == .hugetlbPrivate
        var size: UInt64 = isHuge ? 2 << 20 : UInt64(1 + below(80)) << 12
        // One page of control and a power of two of data.
        if kind == .perfRing { size = UInt64(1 + 1 << below(4)) << 12 }
        names.regions.append("r\(names.regions.count)")
        regionSizes.append(size)
        regionKinds.append(kind)
        // What can only be mapped shared or read is refused by the mapping, which is an answer too.
        let rights: Rights = chance(85) ? [.read, .write] : pick([.read, [], [.read, .write, .execute], .write])
        return .host(region: names.regions.count - 1, kind, size: size, rights)
    }

    private mutating func makeVM(type: UInt64) -> Step {
        names.vms.append("v\(names.vms.count)")
        names.cpus.append([])
        return .createVM(vm: names.vms.count - 1, type: type)
    }

    private mutating func makeCPU(vm: Int, id: UInt64) -> Step {
        if let index = names.cpus[vm].firstIndex(of: id) { return .createCPU(CPU(vm: vm, cpu: index), id: id) }
        names.cpus[vm].append(id)
        return .createCPU(CPU(vm: vm, cpu: names.cpus[vm].count - 1), id: id)
    }

    private mutating func ringCapability() -> UInt64 {
        UInt64(chance(50) ? KVM_CAP_DIRTY_LOG_RING : KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
    }
    private mutating func ringBytes() -> UInt64 {
        chance(75) ? 65536 : pick([0, 4096, 16384, 65537, 1 << 20, 2 << 20, 1 << 32 | 65536])
    }

    // MARK: A step

    private mutating func step() -> Step? {
        switch below(100) {
        case ..<38: return guest()
        case ..<67: return hostChange()
        case ..<78: return regionChange()
        case ..<83: return .getDirtyLog(vm: vm(), slot: slotNumber(), hasBuffer: !chance(4))
        case ..<88: return clearLog()
        case ..<93: return privateMemory()
        default: return rarely()
        }
    }

    private mutating func rarely() -> Step? {
        switch below(12) {
        case 0:
            let vm = vm()
            let id: UInt64 = pick([0, 0, 1, 2, 1023, 4095, 4096, 1 << 32, .max])
            return profile.isTraced && !names.cpus[vm].isEmpty ? nil : makeCPU(vm: vm, id: id)
        case 1: return names.vms.count < (profile.isTraced ? 1 : 4) ? makeVM(type: pick([0, 1, 2, .max])) : nil
        case 2: return names.regions.count < 6 ? makeHost() : nil
        case 3: return enableCapability()
        case 4:
            return .checkExtension(vm: chance(20) ? nil : vm(), capability: pick(capabilities.map(\.1) + [9999, .max]))
        case 5: return cpu().map { .collectRing($0, most: pick([1, 5, 65536])) }
        case 6: return .resetRings(vm: vm())
        case 7:
            return chance(50) ? .resetRings(vm: vm()) : .withoutArgument(vm: vm(), pick(StructureCall.allCases))
        case 8:
            let name = pick(["pf_taken", "pages_4k", "remote_tlb_flush", "no_such_name"])
            return cpu().map { .statistics(vm: $0.vm, cpu: chance(50) ? $0.cpu : nil, names: [name]) }
        case 9: return chance(30) ? closing() : nil
        case 10: return fork()
        default: return chance(20) ? .exit : nil
        }
    }

    private mutating func fork() -> Step? {
        guard names.processes.count < 4, !profile.isTraced else { return nil }
        names.processes.append("p\(names.processes.count)")
        running.append(names.processes.count - 1)
        return .fork(process: names.processes.count - 1)
    }

    private mutating func closing() -> Step? {
        switch below(3) {
        case 0: return .close(.vm(vm()))
        case 1: return cpu().map { .close(.cpu($0)) }
        default: return names.memfds.isEmpty ? nil : .close(.memfd(below(names.memfds.count)))
        }
    }

    private mutating func enableCapability() -> Step {
        let manual = UInt64(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
        let bitmap = UInt64(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP)
        let capability = pick([
            manual, manual, ringCapability(), bitmap, pick(capabilities.map(\.1)), 0xffff_ffff,
        ])
        // It limits the numbers of vCPUs, and nothing else of a script says so.
        if capability == UInt64(KVM_CAP_MAX_VCPU_ID) { return enableCapability() }
        if profile.isTraced, capability == bitmap { return enableCapability() }
        let argument = capability == manual ? pick([0, 1, 2, 3, 4, .max]) : ringBytes()
        return .enableCapability(
            vm: vm(), capability: capability, flags: chance(5) ? 1 : 0, arguments: chance(5) ? [] : [argument])
    }

    mutating func vm() -> Int { names.vms.count > 1 && chance(20) ? below(names.vms.count) : 0 }

    private mutating func cpu() -> CPU? {
        let vm = vm()
        return names.cpus[vm].isEmpty ? nil : CPU(vm: vm, cpu: below(names.cpus[vm].count))
    }

    // MARK: The guest

    private mutating func guest() -> Step? {
        guard let cpu = cpu() else { return nil }
        let kind = pick([GuestAccess.Kind.read, .write, .write, .read, .write, .exec])
        var stride: UInt64 = 4096
        var address = anyAddress() & ~7
        if chance(85) {
            address = (guestPage() &+ word()) & ~7
            if chance(15) { stride = pick([8, 16, 8192, 2 << 20, 1 << 63, 0 &- 4096]) }
        }
        if chance(2) { address = .max & ~7 }
        return .guest(
            cpu,
            GuestAccess(
                kind, address, size: chance(80) || profile.isTraced ? 8 : pick([1, 2, 4]),
                Repetition(count: chance(50) ? 1 : UInt64(1 + below(12)), stride: stride),
                value: value(), emulated: chance(8) && !profile.isTraced))
    }

    /// Begins with the byte of an instruction that needs no operand: it may be executed.
    mutating func value() -> UInt64 {
        (random.next() >> UInt64(below(60))) & ~0xff | pick([0x90, 0xf5, 0xf8, 0xf9, 0xfc, 0x98, 0x99])
    }

    /// Of a page, but for its first 128 bytes: in the first page of a ring of events the kernel keeps time there.
    mutating func word() -> UInt64 { UInt64(16 + below(496)) * 8 }

    /// A page of a slot, or one just beside it.
    private mutating func guestPage() -> UInt64 {
        if slots.isEmpty { return anyAddress() & ~4095 }
        let slot = pick(slots)
        let pages = max(1, slot.size >> 12)
        return slot.guestAddress &+ (chance(8) ? pick([pages << 12, 0 &- 4096]) : (random.next() % pages) << 12)
    }

    mutating func anyAddress() -> UInt64 {
        pick([
            0, 4096, 0x10000, 0x20000, 0x100000, 1 << 32, 1 << 40, (1 << 46) - 4096, 1 << 46, 1 << 52, 1 << 63,
            0 &- 4096, 0x10001, 0xfff, 0x200000, 0x4000_0000,
        ])
    }

    // MARK: Slots

    private mutating func saneRegion() -> Step? {
        guard !regionSizes.isEmpty else { return nil }
        let region = below(regionSizes.count)
        let pages = regionSizes[region] >> 12
        let first = random.next() % pages
        let count = 1 + random.next() % (pages - first)
        let slot = Region(
            slot: UInt64(slots.count), flags: chance(50) ? 1 : UInt64(below(3)),
            guestAddress: UInt64(0x10 + slots.count * 0x200) << 12, size: count << 12,
            userAddress: HostPlace(.region(region), first << 12))
        slots.append(slot)
        return .setRegion(vm: 0, slot, version: 1)
    }

    private mutating func regionChange() -> Step? {
        guard !slots.isEmpty, chance(80) else { return slots.count < 8 && chance(50) ? saneRegion() : oddRegion() }
        let index = below(slots.count)
        var slot = slots[index]
        switch below(8) {
        case 0, 1: slot.flags ^= 1
        case 2: slot.guestAddress = chance(70) ? slot.guestAddress &+ (UInt64(below(9)) << 12) &- 16384 : anyAddress()
        case 3, 4: slot.size = 0
        case 5: slot.flags = pick([0, 1, 2, 3, 4, 5, 6, 8, 1 << 16, 0xffff_ffff])
        case 6:
            guard !names.memfds.isEmpty else { return oddRegion() }
            slot.flags = 4
            slot.memfd = below(names.memfds.count)
            slot.memfdOffset = pick([0, 0, 4096, 1, 1 << 20, 0 &- 4096])
        default: break
        }
        if slot.size == 0 {
            // It comes back with what it had.
            let gone = slots[index]
            if chance(50) { slots.remove(at: index) }
            slot.guestAddress = gone.guestAddress
        } else {
            slots[index] = slot
        }
        return .setRegion(vm: vm(), slot, version: slot.memfd != nil || chance(30) ? 2 : 1)
    }

    /// Right but for its size.
    private mutating func largestRegion() -> Step {
        let region = Region(
            slot: slotNumber(), flags: pick([0, 1, 2]), guestAddress: 1 << UInt64(44 + below(6)),
            size: UInt64(Int32.max) << 12, userAddress: HostPlace(.region(0)))
        return .setRegion(vm: vm(), region, version: 1 + below(2))
    }

    /// Anything.
    private mutating func oddRegion() -> Step? {
        if profile.hasRefusedSlots, chance(5) { return largestRegion() }
        var place = HostPlace(pick([.null, .kernel]), pick([0, 1, 4096, 0 &- 4096]))
        if !regionSizes.isEmpty, chance(75) {
            let region = below(regionSizes.count)
            place = HostPlace(.region(region), pick([0, 4096, regionSizes[region], 1, 8, 1 << 46, 0 &- 4096, 1 << 63]))
        }
        let region = Region(
            slot: slotNumber(), flags: pick([0, 0, 1, 1, 2, 3, 4, 8, 0x8000_0000]), guestAddress: anyAddress(),
            size: pick([0, 1, 4096, 4096, 8192, 65536, 1 << 20, 1 << 31, (1 << 43) - 4096, 1 << 43, 1 << 63, 0 &- 4096]
            ),
            userAddress: place)
        // A slot of terabytes has tables of megabytes: rarely.
        if region.size > 1 << 31, region.size < 1 << 44, !chance(3) { return nil }
        return .setRegion(vm: vm(), region, version: 1 + below(2))
    }

    private mutating func slotNumber() -> UInt64 {
        guard !slots.isEmpty, chance(85) else {
            return pick([0, 1, 7, 32763, 32764, 32766, 32767, 0xffff, 1 << 16, 2 << 16, 0xffff_ffff])
        }
        return pick(slots).slot
    }

    private mutating func clearLog() -> Step? {
        let slot = slotNumber()
        let pages = slots.first { $0.slot == slot }.map { $0.size >> 12 } ?? 64
        let first: UInt64 = pick([0, 0, 0, 64, 1, 128, pages, 0 &- 64])
        let rest = first <= pages ? pages - first : 64
        let count: UInt64 = min(0xffff_ffff, pick([rest, rest, rest, 64, 0, rest &+ 1, 63, 0xffff_ffff]))
        let bits: ClearedPages.Bits =
            switch below(10) {
            case ..<5: .all
            case ..<9: .words((0..<1 + below(2)).map { _ in random.next() })
            default: .missing
            }
        // A buffer for so many pages is the executor's to make.
        if count > 1 << 20, bits != .missing { return nil }
        return .clearDirtyLog(vm: vm(), ClearedPages(slot: slot, first: first, count: count, bits: bits))
    }

    // MARK: Private memory

    private mutating func privateMemory() -> Step? {
        switch below(10) {
        case ..<2:
            guard names.memfds.count < 4 else { return nil }
            names.memfds.append("m\(names.memfds.count)")
            let size: UInt64 = pick([65536, 65536, 1 << 20, 4096, 0, 4095, 1 << 63, 0 &- 4096])
            return .createMemfd(
                vm: vm(), memfd: names.memfds.count - 1, size: size,
                // Not those that newer kernels take.
                flags: chance(5) ? pick([1 << 8, 1 << 63]) : 0)
        case ..<5:
            guard !names.memfds.isEmpty else { return nil }
            return .allocate(
                memfd: below(names.memfds.count), mode: pick([1, 3, 3, 3, 0, 2, 16]),
                offset: pick([0, 0, 4096, 32768, 1, 1 << 20, 0 &- 4096]),
                length: pick([4096, 8192, 65536, 0, 1, 1 << 21, .max]))
        case ..<8:
            return .setAttributes(
                vm: vm(), address: chance(80) ? guestPage() : anyAddress(),
                size: pick([4096, 4096, 16384, 65536, 0, 1, 0 &- 4096]), attributes: pick([0, 8, 8, 8, 1, .max]),
                flags: chance(4) ? 1 : 0)
        default:
            return cpu().map {
                .preFault(
                    $0, address: chance(80) ? guestPage() : anyAddress(),
                    size: pick([4096, 8192, 32768, 0, 1, 0 &- 4096]), flags: chance(4) ? 1 : 0)
            }
        }
    }
}
