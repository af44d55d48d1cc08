import CKVMInterface
import Frames
import HostMemory
import IoctlScript
import Machine
import Testing

@testable import Interface

/// A VM and the process that made it, on a machine of their own, for calls with structures.
private struct RawVM {
    let storage = ModelStorage()!
    let machine: ModelMachine
    let executor: ModelExecutor
    let process: AddressSpace
    let vm: VirtualMachine

    init() throws {
        executor = ModelExecutor(storage)
        machine = executor.machine
        process = machine.space(0)!
        vm = try VirtualMachine(process: process)
    }

    func end() {
        vm.destroy()
        executor.finish()
        #expect(executor.findings.isEmpty)
    }
}

@Suite struct RawIoctls {
    @Test func `a script makes each call without its structure`() throws {
        let calls = StructureCall.allCases.map(\.rawValue)
        let script = "vm\n" + calls.map { "no_argument call=\($0)\n" }.joined()
        #expect(try outcomes(script) == ["0"] + calls.map { _ in "-1 EFAULT" })
        // Whose VM it is not, and which is no more.
        let ends = "vm\nprocess name=p\nno_argument call=region as=p\nclose vm=vm\nno_argument call=region vm=vm\n"
        #expect(try outcomes(ends).suffix(3) == ["-1 EIO", "0", "-1 EBADF"])
        #expect(try Script(text: script, file: "s").source.contains("no_argument vm=vm call=clear_dirty_log\n"))
    }

    @Test func `a null pointer is EFAULT where a structure is wanted, after who calls`() throws {
        let raw = try RawVM()
        let child = try raw.process.fork()
        for request in [
            KVM_SET_USER_MEMORY_REGION, KVM_SET_USER_MEMORY_REGION2, KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG,
            KVM_ENABLE_CAP, KVM_CREATE_GUEST_MEMFD, KVM_SET_MEMORY_ATTRIBUTES,
        ] {
            #expect(raw.vm.ioctl(request, nil) == -14)
            #expect(raw.vm.ioctl(request, nil, by: child) == -5)
        }
        #expect(raw.vm.ioctl(0xae99, nil) == -25)
        #expect(raw.vm.ioctl(0xae99, nil, by: child) == -5)
        let cpu = try raw.vm.createCPU(id: 0)
        #expect(cpu.ioctl(KVM_PRE_FAULT_MEMORY, nil) == -14)
        #expect(cpu.ioctl(KVM_RUN, UnsafeMutableRawPointer(bitPattern: 1)) == -22)
        #expect(cpu.ioctl(KVM_RUN, nil, by: child) == -5)
        child.exit()
        raw.end()
    }

    @Test func `a dead VM answers EIO to everything`() throws {
        let raw = try RawVM()
        let cpu = try raw.vm.createCPU(id: 0)
        raw.vm.core.die()
        #expect(raw.vm.ioctl(KVM_CHECK_EXTENSION, UnsafeMutableRawPointer(bitPattern: 3)) == -5)
        #expect(cpu.ioctl(KVM_RUN, nil) == -5)
        raw.end()
    }

    @Test func `capabilities of the device and of a VM`() throws {
        let raw = try RawVM()
        func ask(_ capability: Int) -> Int {
            raw.vm.ioctl(KVM_CHECK_EXTENSION, UnsafeMutableRawPointer(bitPattern: capability))
        }
        #expect(ask(KVM_CAP_NR_MEMSLOTS) == 32764)
        #expect(ask(KVM_CAP_MULTI_ADDRESS_SPACE) == 2)
        #expect(ask(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) == 3)
        #expect(ask(KVM_CAP_DIRTY_LOG_RING) == 1 << 20)
        #expect(ask(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) == 0)
        #expect(ask(KVM_CAP_GUEST_MEMFD) == 0)
        #expect(KernelFeatures().checkDeviceExtension(UInt64(KVM_CAP_GUEST_MEMFD)) == 1)
        #expect(ask(KVM_CAP_MEMORY_ATTRIBUTES) == 0)
        #expect(KernelFeatures().checkDeviceExtension(UInt64(KVM_CAP_MEMORY_ATTRIBUTES)) == 8)
        #expect(ask(9999) == 0)
        #expect(KernelFeatures().checkDeviceExtension(.max) == 0)
        raw.end()
    }

    @Test func `vCPUs have numbers of their own, each once`() throws {
        let raw = try RawVM()
        func create(_ id: UInt) -> Int { raw.vm.ioctl(KVM_CREATE_VCPU, UnsafeMutableRawPointer(bitPattern: id)) }
        #expect(create(7) == 0)
        #expect(create(7) == -17)
        #expect(create(4095) == 0)
        #expect(create(4096) == -22)
        for id in 0..<300 as Range<UInt> where id != 7 { _ = create(id) }
        #expect(raw.vm.cpus.count == VirtualMachine.mostCPUs)
        raw.end()
    }

    @Test func `the statistics file has KVM's layout`() throws {
        let raw = try RawVM()
        let number = raw.vm.ioctl(KVM_GET_STATS_FD, nil)
        let bytes = try #require(raw.vm.descriptors.read(number))
        let header = bytes.withUnsafeBytes { $0.loadUnaligned(as: kvm_stats_header.self) }
        #expect(header.name_size == 48)
        #expect(header.id_offset == 24)
        #expect(header.desc_offset == 24 + 48)
        #expect(header.data_offset == header.desc_offset + header.num_desc * 64)
        #expect(bytes.count == Int(header.data_offset + header.num_desc * 8))
        #expect(raw.vm.statistics.value(of: "pages_4k") == 0)
        #expect(raw.vm.statistics.value(of: "pages_4") == nil)
        #expect(try raw.vm.createCPU(id: 3).statistics.value(of: "pf_taken") == 0)
        try raw.vm.descriptors.close(number)
        #expect(raw.vm.descriptors.read(number) == nil)
        raw.end()
    }

    @Test func `an MMIO read is completed by the next run with what the user put there`() throws {
        let raw = try RawVM()
        let cpu = try raw.vm.createCPU(id: 0)
        cpu.load(GuestProgram(.read, GuestAddress(0x1000), count: 2))
        #expect(cpu.ioctl(KVM_RUN, nil) == 0)
        #expect(cpu.shared.pointee.exit_reason == UInt32(KVM_EXIT_MMIO))
        #expect(cpu.shared.pointee.mmio.phys_addr == 0x1000)
        withUnsafeMutableBytes(of: &cpu.shared.pointee.mmio.data) { $0.storeBytes(of: 0x55, as: UInt64.self) }
        // Only finishes what is pending, as whoever saves a VM does.
        cpu.shared.pointee.immediate_exit = 1
        #expect(cpu.ioctl(KVM_RUN, nil) == -4)
        #expect(cpu.values == [0x55])
        cpu.shared.pointee.immediate_exit = 0
        #expect(cpu.ioctl(KVM_RUN, nil) == 0)
        #expect(cpu.shared.pointee.mmio.phys_addr == 0x2000)
        raw.end()
    }
}
