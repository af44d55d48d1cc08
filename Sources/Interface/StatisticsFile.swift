import CKVMInterface
import GuestMemory
import IoctlScript

/// The content of the descriptor that `KVM_GET_STATS_FD` returns: a header, the source's name, descriptors, values.
public struct StatisticsFile: Sendable {
    public let bytes: [UInt8]

    private struct Source {
        var name: String
        var flags: Int
        var value: UInt64

        init(_ counter: NamedCounter) {
            let type =
                switch counter.kind {
                case .cumulative: KVM_STATS_TYPE_CUMULATIVE
                case .instant: KVM_STATS_TYPE_INSTANT
                case .peak: KVM_STATS_TYPE_PEAK
                }
            name = "\(counter.name)"
            flags = type | KVM_STATS_UNIT_NONE | KVM_STATS_BASE_POW10
            value = counter.value
        }
    }

    /// A VM's.
    init(vm: VirtualMachine) { self.init("kvm-vm", vm.core.statistics.inOrder.map(Source.init)) }

    /// A vCPU's.
    init(cpu: VirtualCPU) { self.init("kvm-vcpu-\(cpu.id)", cpu.core.statistics.inOrder.map(Source.init)) }

    private init(_ id: String, _ sources: [Source]) {
        let nameSize = Int(KVM_STATS_NAME_SIZE)
        let headerSize = MemoryLayout<kvm_stats_header>.size
        let descriptorSize = MemoryLayout<kvm_stats_desc>.size + nameSize
        var header = kvm_stats_header()
        header.name_size = UInt32(nameSize)
        header.num_desc = UInt32(sources.count)
        header.id_offset = UInt32(headerSize)
        header.desc_offset = UInt32(headerSize + nameSize)
        header.data_offset = UInt32(headerSize + nameSize + sources.count * descriptorSize)
        var bytes: [UInt8] = []
        withUnsafeBytes(of: header) { bytes += $0 }
        bytes += Self.padded(id)
        for (index, source) in sources.enumerated() {
            var descriptor = kvm_stats_desc()
            descriptor.flags = UInt32(source.flags)
            descriptor.size = 1
            descriptor.offset = UInt32(index * 8)
            withUnsafeBytes(of: descriptor) { bytes += $0 }
            bytes += Self.padded(source.name)
        }
        for source in sources { withUnsafeBytes(of: source.value) { bytes += $0 } }
        self.bytes = bytes
    }

    private static func padded(_ name: String) -> [UInt8] {
        let bytes = Array(name.utf8.prefix(Int(KVM_STATS_NAME_SIZE) - 1))
        return bytes + Array(repeating: 0, count: Int(KVM_STATS_NAME_SIZE) - bytes.count)
    }

    /// The value of a name, read the way a program reads it: through header and descriptor. Nil: there is none.
    public func value(of name: String) -> UInt64? { StatisticsContent(bytes).value(of: name) }
}

extension VirtualMachine {
    /// Kernel: what is read from `KVM_GET_STATS_FD` of a VM.
    public var statistics: StatisticsFile { StatisticsFile(vm: self) }
}

extension VirtualCPU {
    /// Kernel: what is read from `KVM_GET_STATS_FD` of a vCPU.
    public var statistics: StatisticsFile { StatisticsFile(cpu: self) }
}
