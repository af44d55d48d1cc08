import Frames
import GuestMemory

/// The open files of the processes that call, by descriptor, as far as KVM's calls make or name them. Kernel: `struct
/// files_struct`.
///
/// A VM's and a vCPU's own descriptors are objects here, not numbers. Shared by the VMs that it is given to; one task.
public final class Descriptors {
    enum File {
        case guestMemory(GuestMemoryFile)
        case statistics(() -> StatisticsFile)
    }
    /// By number; 0 to 2 are taken in every process.
    private var files: [File?] = [nil, nil, nil]
    private static let first = 3

    public init() {}

    /// The lowest number that is free.
    func open(_ file: File) -> Int {
        if let free = files.indices.first(where: { $0 >= Self.first && files[$0] == nil }) {
            files[free] = file
            return free
        }
        files.append(file)
        return files.count - 1
    }

    private func file(_ number: Int) -> File? { files.indices.contains(number) ? files[number] : nil }

    /// What a field of a structure names.
    func guestMemory(_ number: UInt32) -> GuestMemoryDescriptor {
        switch file(Int(number)) {
        case .guestMemory(let file): .file(file)
        case .statistics: .otherFile
        case nil: .closed
        }
    }

    /// Kernel: `close`. EBADF: it is not open.
    public func close(_ number: Int) throws(Errno) {
        guard let file = file(number) else { throw .EBADF }
        files[number] = nil
        if case .guestMemory(let memory) = file { memory.closeDescriptor() }
    }

    /// Kernel: `fallocate`. EBADF; EFBIG: past what any file can have; else what the file says. Of another kind of file:
    /// ENODEV.
    public func allocate(_ number: Int, mode: UInt32, offset: UInt64, length: UInt64) -> Int {
        switch file(number) {
        case nil: return -Int(Errno.EBADF.rawValue)
        case .statistics: return -Int(Errno.ENODEV.rawValue)
        case .guestMemory(let file):
            let mode = AllocationMode(bits: mode)
            // Before the file is asked. Kernel: `vfs_fallocate`.
            let isKnown = mode == .keepSize || mode == .keepSizeAndPunchHole
            let largest = UInt64(Int64.max)
            if isKnown, length > 0, offset <= largest, length <= largest, offset + length > largest {
                return InterfaceErrno.fileTooBig
            }
            return result { () throws(Errno) in
                try file.allocate(mode, offset: offset, length: length)
                return 0
            }
        }
    }

    /// The bytes of a descriptor that KVM_GET_STATS_FD has made. Kernel: `pread`. Nil: there are none.
    public func read(_ number: Int) -> [UInt8]? {
        guard case .statistics(let make) = file(number) else { return nil }
        return make().bytes
    }

    /// Closes everything. Kernel: the end of the last process.
    public func closeAll() {
        for number in files.indices where files[number] != nil {
            do throws(Errno) { try close(number) } catch { preconditionFailure("it was open") }
        }
    }
}
