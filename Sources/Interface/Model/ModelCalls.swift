import CKVMInterface
import Frames
import HostMemory
import IoctlScript

/// Each call of KVM that a script makes, through the model's ioctls.
extension ModelExecutor {
    private func open(_ number: Int) -> OpenVM? { vms.indices.contains(number) ? vms[number] : nil }

    /// The VM behind a descriptor that is open.
    func machine(_ number: Int) -> VirtualMachine? {
        guard let open = open(number), open.isOpen else { return nil }
        return open.vm
    }

    private func cpu(_ place: CPU) -> VirtualCPU? {
        guard let open = open(place.vm), open.cpus.indices.contains(place.cpu) else { return nil }
        return open.cpus[place.cpu]
    }

    /// One ioctl with a structure.
    func call<T>(_ vm: Int, _ request: UInt32, _ argument: inout T, _ space: AddressSpace) -> Int {
        guard let machine = machine(vm) else { return -Int(Errno.EBADF.rawValue) }
        return withUnsafeMutablePointer(to: &argument) { machine.ioctl(request, $0, by: space) }
    }

    // MARK: VMs and vCPUs

    func createVM(_ number: Int, type: UInt64, _ space: AddressSpace) -> Answer {
        while vms.count <= number { vms.append(nil) }
        do throws(Errno) {
            vms[number] = OpenVM(
                try VirtualMachine(process: space, type: type, descriptors: descriptors, features: features))
            return .done
        } catch {
            return Answer(error)
        }
    }

    func createCPU(_ place: CPU, id: UInt64, _ space: AddressSpace) -> Answer {
        guard let open = open(place.vm), open.isOpen else { return .badDescriptor }
        let result = open.vm.ioctl(KVM_CREATE_VCPU, UnsafeMutableRawPointer(bitPattern: UInt(id)), by: space)
        guard result >= 0 else { return Answer(result: result) }
        while open.cpus.count <= place.cpu { open.cpus.append(nil) }
        open.cpus[place.cpu] = open.vm.cpus.last
        return .done
    }

    func close(_ descriptor: Descriptor) -> Answer {
        switch descriptor {
        case .vm(let number):
            guard let open = open(number), open.isOpen else { return .badDescriptor }
            open.isOpen = false
            endIfUnused(number)
        case .cpu(let place):
            guard cpu(place) != nil, let open = open(place.vm) else { return .badDescriptor }
            open.cpus[place.cpu] = nil
            endIfUnused(place.vm)
        case .memfd(let number):
            do throws(Errno) { try descriptors.close(fileNumber(number)) } catch { return Answer(error) }
            memfds[number] = nil
        }
        return .done
    }

    /// The last descriptor of a VM is gone.
    private func endIfUnused(_ number: Int) {
        guard let open = open(number), !open.isInUse else { return }
        open.vm.check(journal)
        open.vm.destroy()
        vms[number] = nil
    }

    // MARK: Slots and logs

    func setRegion(_ vm: Int, _ region: Region, version: Int, _ space: AddressSpace) -> Answer {
        var new = kvm_userspace_memory_region2()
        new.slot = UInt32(truncatingIfNeeded: region.slot)
        new.flags = UInt32(truncatingIfNeeded: region.flags)
        new.guest_phys_addr = region.guestAddress
        new.memory_size = region.size
        new.userspace_addr = region.userAddress.address
        new.guest_memfd_offset = region.memfdOffset
        new.guest_memfd = region.memfd.map { UInt32(truncatingIfNeeded: fileNumber($0)) } ?? .max
        if version == 2 { return Answer(result: call(vm, KVM_SET_USER_MEMORY_REGION2, &new, space)) }
        var old = kvm_userspace_memory_region()
        old.slot = new.slot
        old.flags = new.flags
        old.guest_phys_addr = new.guest_phys_addr
        old.memory_size = new.memory_size
        old.userspace_addr = new.userspace_addr
        return Answer(result: call(vm, KVM_SET_USER_MEMORY_REGION, &old, space))
    }

    /// Pages of the slot as its user knows them: a buffer must be as large.
    private func pages(_ vm: Int, _ slot: UInt32) -> UInt64 {
        guard let machine = machine(vm) else { return 0 }
        return machine.core.withSlots { machine.core.slot(numbered: slot)?.pageCount ?? 0 }
    }

    func getDirtyLog(_ vm: Int, slot: UInt32, hasBuffer: Bool, _ space: AddressSpace) -> Answer {
        var log = kvm_dirty_log()
        log.slot = slot
        guard hasBuffer else { return Answer(result: call(vm, KVM_GET_DIRTY_LOG, &log, space)) }
        var words = [UInt64](repeating: 0, count: Int((pages(vm, slot) + 63) / 64))
        // Never null, even for a slot that is not there.
        words.append(0)
        let result = words.withUnsafeMutableBytes { buffer in
            log.dirty_bitmap = buffer.baseAddress
            return call(vm, KVM_GET_DIRTY_LOG, &log, space)
        }
        words.removeLast()
        return Answer(result: result, [.init("bits", .list(words))])
    }

    func clearDirtyLog(_ vm: Int, _ pages: ClearedPages, _ space: AddressSpace) -> Answer {
        var log = kvm_clear_dirty_log()
        log.slot = UInt32(truncatingIfNeeded: pages.slot)
        log.num_pages = UInt32(truncatingIfNeeded: pages.count)
        log.first_page = pages.first
        let wanted = Int((pages.count + 63) / 64)
        var words: [UInt64]
        switch pages.bits {
        case .missing: return Answer(result: call(vm, KVM_CLEAR_DIRTY_LOG, &log, space))
        case .all: words = Array(repeating: .max, count: wanted)
        case .words(let given): words = given + Array(repeating: 0, count: max(0, wanted - given.count))
        }
        words.append(0)
        let result = words.withUnsafeMutableBytes { buffer in
            log.dirty_bitmap = buffer.baseAddress
            return call(vm, KVM_CLEAR_DIRTY_LOG, &log, space)
        }
        return Answer(result: result)
    }

    // MARK: Private memory, and what comes ahead of the guest

    /// -1 for a file that could not be made, or is closed.
    func fileNumber(_ memfd: Int) -> Int { memfds.indices.contains(memfd) ? memfds[memfd] ?? -1 : -1 }

    func createMemfd(_ vm: Int, _ memfd: Int, size: UInt64, flags: UInt64, _ space: AddressSpace) -> Answer {
        while memfds.count <= memfd { memfds.append(nil) }
        var request = kvm_create_guest_memfd()
        request.size = size
        request.flags = flags
        let result = call(vm, KVM_CREATE_GUEST_MEMFD, &request, space)
        guard result >= 0 else { return Answer(result: result) }
        memfds[memfd] = result
        return .done
    }

    func preFault(_ place: CPU, address: UInt64, size: UInt64, flags: UInt64, _ space: AddressSpace) -> Answer {
        guard let cpu = cpu(place) else { return .badDescriptor }
        var request = kvm_pre_fault_memory()
        request.gpa = address
        request.size = size
        request.flags = flags
        let result = withUnsafeMutablePointer(to: &request) { cpu.ioctl(KVM_PRE_FAULT_MEMORY, $0, by: space) }
        return Answer(result: result, [.init("gpa", .hex(request.gpa)), .init("size", .hex(request.size))])
    }

    func collectRing(_ place: CPU, most: Int) -> Answer {
        guard let cpu = cpu(place) else { return .badDescriptor }
        guard let collected = cpu.collectRing(atMost: most) else { return Answer(.signal("SIGBUS")) }
        let entries = collected.map { RingEntry(slot: $0.slot, offset: $0.offset) }
        return Answer(
            .returned(0), [.init("count", .decimal(UInt64(entries.count))), .init("entries", .entries(entries))])
    }

    // MARK: Capabilities and statistics

    func enableCapability(
        _ vm: Int, _ capability: UInt64, flags: UInt64, _ arguments: [UInt64], _ space: AddressSpace
    ) -> Answer {
        var request = kvm_enable_cap()
        request.cap = UInt32(truncatingIfNeeded: capability)
        request.flags = UInt32(truncatingIfNeeded: flags)
        let given = arguments + Array(repeating: 0, count: 4 - arguments.count)
        request.args = (given[0], given[1], given[2], given[3])
        return Answer(result: call(vm, KVM_ENABLE_CAP, &request, space))
    }

    func checkExtension(_ vm: Int?, _ capability: UInt64, _ space: AddressSpace) -> Answer {
        guard let vm else { return Answer(result: features.checkDeviceExtension(capability)) }
        guard let machine = machine(vm) else { return .badDescriptor }
        let number = UnsafeMutableRawPointer(bitPattern: UInt(capability))
        return Answer(result: machine.ioctl(KVM_CHECK_EXTENSION, number, by: space))
    }

    func statistics(_ vm: Int, cpu place: Int?, _ names: [String], _ space: AddressSpace) -> Answer {
        let file: StatisticsFile
        do throws(Errno) {
            if let place {
                guard let cpu = cpu(CPU(vm: vm, cpu: place)) else { return .badDescriptor }
                try cpu.vm.core.checkCaller(space)
                file = cpu.statistics
            } else {
                guard let machine = machine(vm) else { return .badDescriptor }
                try machine.core.checkCaller(space)
                file = machine.statistics
            }
        } catch {
            return Answer(error)
        }
        let fields = names.map { name in
            Answer.Field(name, file.value(of: name).map { .decimal($0) } ?? .word("none"))
        }
        return Answer(.returned(0), fields)
    }

    // MARK: The guest

    func run(_ place: CPU, _ access: GuestAccess, _ space: AddressSpace) -> Answer {
        guard let cpu = cpu(place) else { return .badDescriptor }
        cpu.load(
            GuestProgram(
                access.kind.modelled, GuestAddress(access.address), size: access.size,
                count: access.repetition.count, stride: access.repetition.stride, value: access.value,
                emulated: access.emulated))
        let result = cpu.ioctl(KVM_RUN, nil, by: space)
        // EIO comes before the guest, and the shared page is as it was.
        if result == -Int(Errno.EIO.rawValue) { return Answer(result: result) }
        return Answer(
            result < 0 ? .failed(Int32(-result)) : .returned(Int64(result)), exitFields(cpu, access.kind, result))
    }

    /// The exit's reason and fields; then what was done.
    private func exitFields(_ cpu: VirtualCPU, _ kind: GuestAccess.Kind, _ result: Int) -> [Answer.Field] {
        var fields: [Answer.Field] = []
        let shared = cpu.shared.pointee
        switch Int(shared.exit_reason) {
        case KVM_EXIT_IO: fields.append(.init("exit", .word("io")))
        case KVM_EXIT_MMIO:
            fields += [
                .init("exit", .word("mmio")), .init("phys_addr", .hex(shared.mmio.phys_addr)),
                .init("len", .decimal(UInt64(shared.mmio.len))),
                .init("is_write", .decimal(UInt64(shared.mmio.is_write))),
            ]
            if shared.mmio.is_write != 0 {
                fields.append(
                    .init("data", .hex(withUnsafeBytes(of: shared.mmio.data) { $0.loadUnaligned(as: UInt64.self) })))
            }
        case KVM_EXIT_INTR: fields.append(.init("exit", .word("intr")))
        case KVM_EXIT_DIRTY_RING_FULL: fields.append(.init("exit", .word("dirty_ring_full")))
        case KVM_EXIT_INTERNAL_ERROR:
            fields += [
                .init("exit", .word("internal_error")), .init("suberror", .decimal(UInt64(shared.internal.suberror))),
            ]
        case KVM_EXIT_MEMORY_FAULT:
            fields += [
                .init("exit", .word("memory_fault")), .init("flags", .hex(shared.memory_fault.flags)),
                .init("gpa", .hex(shared.memory_fault.gpa)), .init("size", .hex(shared.memory_fault.size)),
            ]
        default: break
        }
        fields.append(.init("done", .decimal(cpu.done)))
        if kind == .read, !cpu.values.isEmpty { fields.append(.init("values", .list(cpu.values))) }
        return fields
    }
}

extension GuestAccess.Kind {
    var modelled: AccessKind {
        switch self {
        case .read: .read
        case .write: .write
        case .exec: .execute
        }
    }
}
