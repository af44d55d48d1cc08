import Audit
import CKVMInterface
import Frames
import HostMemory
import IoctlScript
import Machine

/// Runs a script on the model: a machine of its own, with one process, and no VM yet.
public final class ModelExecutor: Executor {
    public let journal: Journal
    let machine: ModelMachine
    var vms: [OpenVM?] = []
    let descriptors = Descriptors()
    let features: KernelFeatures
    /// Numbers of descriptors, by the script's number; nil: never made, or closed.
    var memfds: [Int?] = []

    /// Nil: no room for its memory.
    public convenience init?(features: KernelFeatures = KernelFeatures()) {
        guard let storage = ModelStorage() else { return nil }
        self.init(storage, features: features)
    }

    /// On memory that other executors have used before, one at a time.
    public init(_ storage: ModelStorage, features: KernelFeatures = KernelFeatures()) {
        self.features = features
        journal = Journal(keepsEvents: false)
        machine = ModelMachine(storage, journal, features)
    }

    public func perform(_ step: Step, process: Int) -> Answer {
        guard let space = machine.space(process) else { return Answer(.notHere("the process could not be made")) }
        switch step {
        case .host, .map, .unmap, .protect, .advise, .remap, .truncate, .punchHost, .load, .store, .splice,
            .drain, .fork, .exit:
            return machine.perform(step, process: process, space)
        case .createVM(let vm, let type): return createVM(vm, type: type, space)
        case .createCPU(let cpu, let id): return createCPU(cpu, id: id, space)
        case .close(let descriptor): return close(descriptor)
        case .setRegion(let vm, let region, let version): return setRegion(vm, region, version: version, space)
        case .getDirtyLog(let vm, let slot, let hasBuffer):
            return getDirtyLog(vm, slot: UInt32(truncatingIfNeeded: slot), hasBuffer: hasBuffer, space)
        case .clearDirtyLog(let vm, let pages): return clearDirtyLog(vm, pages, space)
        case .enableCapability(let vm, let capability, let flags, let arguments):
            return enableCapability(vm, capability, flags: flags, arguments, space)
        case .checkExtension(let vm, let capability): return checkExtension(vm, capability, space)
        case .statistics(let vm, let cpu, let names): return statistics(vm, cpu: cpu, names, space)
        case .guest(let cpu, let access): return run(cpu, access, space)
        case .createMemfd(let vm, let memfd, let size, let flags):
            return createMemfd(vm, memfd, size: size, flags: flags, space)
        case .allocate(let memfd, let mode, let offset, let length):
            return Answer(
                result: descriptors.allocate(
                    fileNumber(memfd), mode: UInt32(truncatingIfNeeded: mode), offset: offset, length: length))
        case .setAttributes(let vm, let address, let size, let attributes, let flags):
            var request = kvm_memory_attributes(address: address, size: size, attributes: attributes, flags: flags)
            return Answer(result: call(vm, KVM_SET_MEMORY_ATTRIBUTES, &request, space))
        case .preFault(let cpu, let address, let size, let flags):
            return preFault(cpu, address: address, size: size, flags: flags, space)
        case .collectRing(let cpu, let most): return collectRing(cpu, most: Int(clamping: most))
        case .withoutArgument(let vm, let call):
            guard let machine = machine(vm) else { return .badDescriptor }
            return Answer(result: machine.ioctl(call.request, nil, by: space))
        case .resetRings(let vm):
            guard let machine = machine(vm) else { return .badDescriptor }
            return Answer(result: machine.ioctl(KVM_RESET_DIRTY_RINGS, nil, by: space))
        }
    }

    /// Closes every descriptor and ends every process. What breaks a rule, and what is left over, is in the journal.
    public func finish() {
        for index in vms.indices {
            guard let open = vms[index] else { continue }
            open.vm.check(journal)
            open.vm.destroy()
            vms[index] = nil
        }
        descriptors.closeAll()
        journal.checkQuiescent()
        machine.finish()
    }

    /// What broke a rule so far.
    public var findings: [Finding] { journal.findings }

    /// Rules that hold between any two steps, looked at now.
    public func check() {
        for open in vms { open?.vm.check(journal) }
    }
}

/// A VM and the descriptors that lead to it: it lives as long as one is open.
final class OpenVM {
    let vm: VirtualMachine
    /// The VM's own descriptor is open.
    var isOpen = true
    /// vCPUs, by the script's number; nil: never made, or closed.
    var cpus: [VirtualCPU?] = []

    init(_ vm: VirtualMachine) { self.vm = vm }

    var isInUse: Bool { isOpen || cpus.contains { $0 != nil } }
}

extension Answer {
    static let badDescriptor = Answer(.failed(Errno.EBADF.rawValue))

    /// What a call returned.
    init(result: Int, _ fields: [Field] = []) {
        self.init(result < 0 ? .failed(Int32(-result)) : .returned(Int64(result)), result < 0 ? [] : fields)
    }

    init(_ error: Errno) { self.init(.failed(error.rawValue)) }
}
