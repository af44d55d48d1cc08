import CLinuxKVM
import IoctlScript

/// Steps as the flat calls that the child understands. Remembers what a script has made, by number.
struct CallEncoding {
    /// Whether the emulator can be had.
    var emulates: Bool
    /// Bytes of shared memory that the script may still make: no limit of a process counts it.
    private var sharedMemory: UInt64
    /// vCPUs of all VMs are numbered alike.
    private var cpus: [[Int]] = []
    private var cpuCount = 0
    private var kinds: [HostKind?] = []

    init(emulates: Bool, sharedMemory: UInt64) {
        self.emulates = emulates
        self.sharedMemory = sharedMemory
    }

    /// Calls of a batch, for as many of the lines as there is room; for each why it is not made, or nil.
    mutating func encode(
        _ lines: ArraySlice<Script.Line>, _ calls: UnsafeMutablePointer<fl_kvm_call>,
        _ input: UnsafeMutablePointer<UInt64>
    ) -> [String?] {
        var words = 0
        var refusals: [String?] = []
        for line in lines.prefix(Int(fl_kvm_batch)) {
            guard words + line.step.words.count <= Int(fl_kvm_input_words) else { break }
            let refusal = refusal(of: line.step)
            if refusal == nil { sharedMemory -= min(sharedMemory, line.step.sharedMemory) }
            var call = refusal == nil ? encode(line.step) : fl_kvm_call()
            call.process = UInt32(line.process)
            call.first_word = UInt32(words)
            call.words = UInt32(line.step.words.count)
            for word in line.step.words {
                input[words] = word
                words += 1
            }
            calls[refusals.count] = call
            refusals.append(refusal)
        }
        return refusals
    }

    /// Why the child is not asked; nil: it is.
    private func refusal(of step: Step) -> String? {
        switch step {
        case .host(_, let kind, _, _) where !kind.isPortable: "\(kind.rawValue) is memory that only the model has"
        case .guest(_, let access) where access.emulated && !emulates:
            "this KVM has a guest's privileged code run by the processor"
        case _ where step.sharedMemory > sharedMemory:
            "a script may make less memory than that"
        case .createCPU where cpuCount >= fl_kvm_most_cpus: "more than \(fl_kvm_most_cpus) vCPUs"
        default: nil
        }
    }

    // MARK: Numbers

    private mutating func number(_ cpu: CPU) -> Int {
        while cpus.count <= cpu.vm { cpus.append([]) }
        while cpus[cpu.vm].count <= cpu.cpu {
            // What is refused stays closed.
            cpus[cpu.vm].append(min(cpuCount, Int(fl_kvm_most_cpus) - 1))
            cpuCount += 1
        }
        return cpus[cpu.vm][cpu.cpu]
    }

    private func call(_ operation: Int, _ subject: Int, _ numbers: UInt64..., special: Int = 0) -> fl_kvm_call {
        var call = fl_kvm_call()
        call.operation = UInt32(operation)
        call.subject = Int32(subject)
        call.special = UInt32(special)
        withUnsafeMutableBytes(of: &call.numbers) { bytes in
            for (index, number) in numbers.enumerated() {
                bytes.storeBytes(of: number, toByteOffset: index * 8, as: UInt64.self)
            }
        }
        return call
    }

    private mutating func encode(_ step: Step) -> fl_kvm_call {
        switch step {
        case .host, .map, .unmap, .protect, .advise, .remap, .truncate, .punchHost, .load, .store, .splice,
            .drain, .fork, .exit:
            return hostCall(step)
        case .createVM(let vm, let type): return call(fl_kvm_create_vm, vm, type)
        case .createCPU(let cpu, let id): return call(fl_kvm_create_cpu, number(cpu), UInt64(cpu.vm), id)
        case .close(.vm(let vm)): return call(fl_kvm_close_vm, vm)
        case .close(.cpu(let cpu)): return call(fl_kvm_close_cpu, number(cpu))
        case .close(.memfd(let memfd)): return call(fl_kvm_close_memfd, memfd)
        case .enableCapability(let vm, let capability, let flags, let given):
            let arguments = given + Array(repeating: 0, count: 4 - given.count)
            return call(
                fl_kvm_enable_cap, vm, capability, flags, arguments[0], arguments[1], arguments[2], arguments[3])
        case .checkExtension(let vm, let capability): return call(fl_kvm_check_extension, vm ?? -1, capability)
        case .statistics(let vm, nil, _): return call(fl_kvm_statistics, vm)
        case .statistics(let vm, let cpu?, _): return call(fl_kvm_cpu_statistics, number(CPU(vm: vm, cpu: cpu)))
        case .guest(let cpu, let access):
            return call(
                fl_kvm_guest, number(cpu), access.kind.code, access.address, access.size, access.repetition.count,
                access.repetition.stride, access.value, access.emulated ? 1 : 0)
        case .setRegion, .getDirtyLog, .clearDirtyLog, .createMemfd, .allocate, .setAttributes, .preFault,
            .collectRing, .resetRings, .withoutArgument:
            return memoryCall(step)
        }
    }

    // MARK: The process's memory

    // Numbers of Linux's interface.
    private static let shared: UInt64 = 1
    private static let isPrivate: UInt64 = 2
    private static let fixed: UInt64 = 0x10
    private static let anonymous: UInt64 = 0x20
    private static let fixedNoReplace: UInt64 = 0x10_0000
    private static let mayMoveFixed: UInt64 = 3

    private mutating func hostCall(_ step: Step) -> fl_kvm_call {
        switch step {
        case .host(let region, let kind, let size, let rights):
            while kinds.count <= region { kinds.append(nil) }
            kinds[region] = kind
            let address = HostPlace(.region(region)).address
            return call(fl_kvm_host, region, address, kind.code, size, UInt64(rights.rawValue))
        case .map(let place, let length, let rights, let source, let replaces):
            var flags = replaces ? Self.fixed : Self.fixedNoReplace
            var object = -1
            var offset: UInt64 = 0
            switch source {
            case .anonymous: flags |= Self.anonymous | Self.isPrivate
            case .sharedAnonymous: flags |= Self.anonymous | Self.shared
            case .object(let region, let start):
                object = region
                offset = start
                flags |=
                    kinds.indices.contains(region) && kinds[region]?.isShared == false ? Self.isPrivate : Self.shared
            }
            return call(fl_kvm_map, object, place.address, length, UInt64(rights.rawValue), flags, offset)
        case .unmap(let place, let length): return call(fl_kvm_unmap, -1, place.address, length)
        case .protect(let place, let length, let rights):
            return call(fl_kvm_protect, -1, place.address, length, UInt64(rights.rawValue))
        case .advise(let place, let length, let advice):
            return call(fl_kvm_advise, -1, place.address, length, advice.rawValue)
        case .remap(let place, let length, let newLength, let target):
            return call(
                fl_kvm_remap, -1, place.address, length, newLength, target == nil ? 0 : Self.mayMoveFixed,
                target?.address ?? 0)
        case .truncate(let region, let size): return call(fl_kvm_truncate, region, size)
        case .punchHost(let region, let offset, let length): return call(fl_kvm_punch, region, offset, length)
        case .load(let place, let repetition):
            return call(fl_kvm_load, -1, place.address, repetition.count, repetition.stride)
        case .store(let place, let repetition, let value):
            return call(fl_kvm_store, -1, place.address, repetition.count, repetition.stride, value)
        case .splice(let place): return call(fl_kvm_splice, -1, place.address)
        case .drain: return call(fl_kvm_drain, -1)
        case .fork(let process): return call(fl_kvm_fork, process)
        case .exit: return call(fl_kvm_exit, -1)
        default: preconditionFailure("no call of the host")
        }
    }

    // MARK: The guest's memory

    private mutating func memoryCall(_ step: Step) -> fl_kvm_call {
        switch step {
        case .setRegion(let vm, let region, let version):
            // No file is a number that none has.
            return call(
                version == 2 ? fl_kvm_set_region2 : fl_kvm_set_region, vm, region.slot, region.flags,
                region.guestAddress, region.size, region.userAddress.address, region.memfdOffset,
                region.memfd.map { UInt64($0) } ?? .max)
        case .getDirtyLog(let vm, let slot, let hasBuffer):
            return call(fl_kvm_get_log, vm, slot, hasBuffer ? 1 : 0)
        case .clearDirtyLog(let vm, let pages):
            return call(
                fl_kvm_clear_log, vm, pages.slot, pages.first, pages.count, special: pages.bits.code)
        case .createMemfd(let vm, let memfd, let size, let flags):
            return call(fl_kvm_create_memfd, vm, UInt64(memfd), size, flags)
        case .allocate(let memfd, let mode, let offset, let length):
            return call(fl_kvm_allocate, memfd, mode, offset, length)
        case .setAttributes(let vm, let address, let size, let attributes, let flags):
            return call(fl_kvm_set_attributes, vm, address, size, attributes, flags)
        case .preFault(let cpu, let address, let size, let flags):
            return call(fl_kvm_prefault, number(cpu), address, size, flags)
        case .collectRing(let cpu, let most): return call(fl_kvm_collect_ring, number(cpu), most)
        case .resetRings(let vm): return call(fl_kvm_reset_rings, vm)
        case .withoutArgument(let vm, let structureCall):
            return call(fl_kvm_no_argument, vm, UInt64(structureCall.request))
        default: preconditionFailure("no call about the guest's memory")
        }
    }
}

extension Step {
    /// Bytes of shared memory that the call makes. More than any machine has the kernel refuses.
    fileprivate var sharedMemory: UInt64 {
        switch self {
        case .host(_, let kind, let size, _) where kind.isPortable && kind.isShared && kind != .none: size
        case .map(_, let length, _, .sharedAnonymous, _) where length < 1 << 44: length
        default: 0
        }
    }

    /// What the call passes besides numbers.
    fileprivate var words: [UInt64] {
        if case .clearDirtyLog(_, let pages) = self, case .words(let words) = pages.bits { return words }
        return []
    }
}

extension ClearedPages.Bits {
    fileprivate var code: Int {
        switch self {
        case .all: fl_kvm_all_ones
        case .missing: fl_kvm_null
        case .words: 0
        }
    }
}

extension GuestAccess.Kind {
    fileprivate var code: UInt64 {
        switch self {
        case .read: UInt64(fl_kvm_read_access)
        case .write: UInt64(fl_kvm_write_access)
        case .exec: UInt64(fl_kvm_exec_access)
        }
    }
}

extension HostKind {
    /// Whether the object behind it is mapped shared.
    fileprivate var isShared: Bool {
        switch self {
        case .anonymous, .memfdPrivate, .filePrivate, .hugetlbPrivate: false
        default: true
        }
    }

    fileprivate var code: UInt64 {
        let code =
            switch self {
            case .anonymous: fl_kvm_kind_anonymous
            case .sharedAnonymous: fl_kvm_kind_shared_anonymous
            case .memfd: fl_kvm_kind_memfd
            case .memfdPrivate: fl_kvm_kind_memfd_private
            case .file: fl_kvm_kind_file
            case .filePrivate: fl_kvm_kind_file_private
            case .secret: fl_kvm_kind_secret
            case .hugetlb: fl_kvm_kind_hugetlb
            case .hugetlbPrivate: fl_kvm_kind_hugetlb_private
            case .perfRing: fl_kvm_kind_perf_ring
            case .packetRing: fl_kvm_kind_packet_ring
            // Those that no process can have are refused before.
            case .none, .graphics, .deviceBAR, .reserved, .countedPFNMap, .mixedmap, .dax: fl_kvm_kind_none
            }
        return UInt64(code)
    }
}
