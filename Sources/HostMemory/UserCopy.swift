import Frames
import Synchrony

/// The kernel's own accesses to the process's memory, through the process's mapping and with its rights.
///
/// Each copies as far as it can and returns how many bytes that was: fewer than asked for where an access can't be made.
/// A line of 64 bytes goes under one hold of the page-table lock, so that what the host does to the page can come in
/// between, as it can between the moves of a real copy. May sleep, and fault pages in, but where `faulting` is false
/// (Kernel: `pagefault_disable`).
extension AddressSpace {
    /// Kernel: `copy_from_user`, `copy_from_user_inatomic`, which return how many bytes are *left*.
    public func copyIn(
        _ address: UserAddress, to buffer: UnsafeMutableRawBufferPointer, faulting: Bool = true
    ) -> Int {
        transfer(address, buffer.count, write: false, faulting: faulting) { bytes, part in
            bytes.read(into: UnsafeMutableRawBufferPointer(rebasing: buffer[part]))
        }
    }

    /// Kernel: `copy_to_user`.
    public func copyOut(_ address: UserAddress, from buffer: UnsafeRawBufferPointer) -> Int {
        transfer(address, buffer.count, write: true, faulting: true) { bytes, part in
            bytes.write(from: UnsafeRawBufferPointer(rebasing: buffer[part]))
        }
    }

    /// Writes `count` zeros. Kernel: `clear_user`.
    public func clear(_ address: UserAddress, _ count: Int) -> Int {
        transfer(address, count, write: true, faulting: true) { bytes, part in bytes.clear(part.count) }
    }

    private func transfer(
        _ address: UserAddress, _ count: Int, write: Bool, faulting: Bool, _ body: (SharedBytes, Range<Int>) -> Void
    ) -> Int {
        // Kernel: `access_ok`.
        let (end, wraps) = address.value.addingReportingOverflow(UInt64(count))
        guard !wraps, end <= UserAddress.end.value else { return 0 }
        if faulting { mightSleep() }
        var done = 0
        while done < count {
            let next = address + UInt64(done)
            let part = done..<min(done + 64 - Int(next.value & 63), count)
            let isDone: Void? = withFrame(of: next, write: write) { frame in
                body(SharedBytes(at: memory.bytes(of: frame) + Int(next.offset)), part)
            }
            if isDone != nil {
                done = part.upperBound
                continue
            }
            guard faulting else { return done }
            do throws(UserFault) { try fault(next, write: write) } catch { return done }
        }
        return done
    }
}

extension AddressSpace {
    /// In what pages the area of `address` is mapped: those of its pool, else 4 KiB, and also where nothing is mapped.
    /// Huge pages that come and go by themselves don't count. Takes `mmapLock`. Kernel: `vma_kernel_pagesize`.
    public func areaPageSize(_ address: UserAddress) -> PageLevel {
        mmapLock.lockForRead()
        defer { mmapLock.unlockRead() }
        guard let vma = find(address), case .huge(let file, _, _) = vma.backing else { return .page4K }
        return file.level
    }
}
