#if os(Linux)
    import Foundation
    import Frames
    import Glibc
    import HostMemory

    /// A window of this process's own memory, and what the kernel says of it: for what `conform host` leaves out.
    struct RealWindow {
        /// Nobody else's: suites run side by side.
        let base: UserAddress

        static func text(_ path: String) throws -> String {
            let file = try FileHandle(forReadingFrom: URL(filePath: path))
            return String(decoding: try file.readToEnd() ?? Data(), as: UTF8.self)
        }

        func place(_ page: Int) -> UnsafeMutableRawPointer? {
            UnsafeMutableRawPointer(bitPattern: UInt(base.value) + UInt(page) << 12)
        }

        /// Errno, or "0".
        static func answer(failed: Bool) -> String {
            failed ? Errno(rawValue: errno).map { "\($0)" } ?? "errno \(errno)" : "0"
        }

        func map(_ pages: Range<Int>, _ protection: Protection) -> String {
            let fixedNoReplace: Int32 = 0x10_0000
            let flags = MAP_PRIVATE | MAP_ANONYMOUS | fixedNoReplace
            return Self.answer(
                failed: mmap(place(pages.lowerBound), pages.count << 12, Self.bits(protection), flags, -1, 0)
                    == MAP_FAILED)
        }

        static func bits(_ protection: Protection) -> Int32 {
            (protection.read ? PROT_READ : 0) | (protection.write ? PROT_WRITE : 0)
        }

        func advise(_ pages: Range<Int>, _ advice: Advice) -> String {
            for number in UInt64(0)...110 where Advice(number: number) == advice {
                return Self.answer(failed: madvise(place(pages.lowerBound), pages.count << 12, Int32(number)) != 0)
            }
            preconditionFailure("an advice without a number")
        }

        /// The entries of `/proc/self/pagemap`.
        func pagemap(_ pages: Int) throws -> [UInt64] {
            let file = try FileHandle(forReadingFrom: URL(filePath: "/proc/self/pagemap"))
            try file.seek(toOffset: base.page * 8)
            let entries = try file.read(upToCount: pages * 8) ?? Data()
            return entries.withUnsafeBytes { Array($0.bindMemory(to: UInt64.self)) }
        }
    }
#endif
