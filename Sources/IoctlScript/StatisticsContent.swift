import CKVMInterface

/// What the descriptor that `KVM_GET_STATS_FD` returns holds, whoever made it: a header, descriptors with names, values.
public struct StatisticsContent: Sendable {
    private let bytes: [UInt8]

    public init(_ bytes: [UInt8]) { self.bytes = bytes }

    /// The first value of a name. Nil: there is none, or the content ends too early.
    public func value(of name: String) -> UInt64? {
        bytes.withUnsafeBytes { bytes in
            guard bytes.count >= MemoryLayout<kvm_stats_header>.size else { return nil }
            let header = bytes.loadUnaligned(as: kvm_stats_header.self)
            let size = MemoryLayout<kvm_stats_desc>.size + Int(header.name_size)
            for index in 0..<Int(header.num_desc) {
                let place = Int(header.desc_offset) + index * size
                guard place + size <= bytes.count else { return nil }
                let descriptor = bytes.loadUnaligned(fromByteOffset: place, as: kvm_stats_desc.self)
                let start = place + MemoryLayout<kvm_stats_desc>.size
                let found = bytes[start..<start + Int(header.name_size)].prefix { $0 != 0 }
                guard found.elementsEqual(name.utf8) else { continue }
                let value = Int(header.data_offset) + Int(descriptor.offset)
                return value + 8 <= bytes.count ? bytes.loadUnaligned(fromByteOffset: value, as: UInt64.self) : nil
            }
            return nil
        }
    }
}
