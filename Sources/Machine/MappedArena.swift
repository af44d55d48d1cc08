#if canImport(Glibc) && !hasFeature(Embedded)
    import Glibc

    /// Memory for a world's arena on Linux: reserved as a whole, committed page by page as it is touched, zero at first.
    public final class MappedArena: @unchecked Sendable {
        // Unchecked: the pointer never changes; what it points to belongs to the world.
        public let base: UnsafeMutableRawPointer
        public let size: Int

        /// Nil when the address space or the overcommit limit does not allow `size` bytes.
        /// - Parameter hugePages: ask this machine for huge pages; else for none, since they would commit, and clear,
        ///   2 MiB for each table entry touched.
        public init?(size: Int, hugePages: Bool = false) {
            guard size > 0,
                let base = mmap(
                    nil, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0),
                base != MAP_FAILED
            else { return nil }
            // Advice: where the machine has no huge pages it fails, and nothing is lost.
            _ = madvise(base, size, hugePages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE)
            self.base = base
            self.size = size
        }

        /// Makes every byte zero again and gives the memory back to the machine.
        public func forget() { madvise(base, size, MADV_DONTNEED) }

        deinit { munmap(base, size) }
    }
#endif
