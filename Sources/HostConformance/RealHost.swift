#if os(Linux)
    import CHostProcess
    import Frames
    import Glibc
    import HostMemory

    /// Processes of the kernel that runs this.
    final class RealHost {
        private let host: OpaquePointer
        /// The harness failed: nothing more can be said.
        struct Broken: Error { let reason: String }

        /// Nil, if no process can be started.
        init?() {
            guard let host = fl_host_start() else { return nil }
            self.host = host
        }

        deinit { fl_host_stop(host) }

        /// Whether the processes have a swap device of their own.
        var hasSwap: Bool { fl_host_has_swap(host) == 1 }

        var hasSecret: Bool { fl_host_has_secret(host) == 1 }

        func begin() throws(Broken) {
            let failed = fl_host_begin(host)
            if failed != 0 { throw Broken(reason: "no first process: errno \(failed)") }
        }

        private static func address(_ page: Int) -> UInt64 { FL_HOST_BASE + UInt64(page) * pageSize }

        func perform(_ call: HostCall) throws(Broken) -> HostAnswer {
            switch call {
            case .map(let process, let pages, let kind, let protection):
                var request = request(fl_host_map, pages)
                request.argument = bits(protection)
                switch kind {
                case .anonymous: request.value = Bits.mapPrivate | Bits.mapAnonymous
                case .anonymousShared: request.value = Bits.mapShared | Bits.mapAnonymous
                case .file(let file, let first, let shared):
                    request.value = shared ? Bits.mapShared : Bits.mapPrivate
                    request.file = Int32(file)
                    request.offset = UInt64(first) * pageSize
                case .secret(let first, let shared):
                    request.value = shared ? Bits.mapShared : Bits.mapPrivate
                    request.file = Int32(fl_host_secret)
                    request.offset = UInt64(first) * pageSize
                }
                request.value |= Bits.mapFixedNoReplace
                return try ask(process, request)
            case .raw(let process, let call): return try ask(process, request(call))
            case .unmap(let process, let pages): return try ask(process, request(fl_host_unmap, pages))
            case .protect(let process, let pages, let protection):
                var request = request(fl_host_protect, pages)
                request.argument = bits(protection)
                return try ask(process, request)
            case .advise(let process, let pages, let advice):
                var request = request(fl_host_advise, pages)
                // The numbers of the interface: the C library's header is older than some.
                request.argument =
                    switch advice {
                    case .dontNeed: 4
                    case .mergeable: 12
                    case .unmergeable: 13
                    case .hugePage: 14
                    case .noHugePage: 15
                    case .populateRead: 22
                    case .populateWrite: 23
                    case .remove: 9
                    case .cold: 20
                    case .pageOut: 21
                    case .free: 8
                    case .guardInstall: 102
                    case .guardRemove: 103
                    }
                return try ask(process, request)
            case .remap(let process, let pages, let count, let target):
                var request = request(fl_host_remap, pages)
                request.value = UInt64(count) * pageSize
                request.offset = target.map(Self.address) ?? 0
                request.flags = target == nil ? 0 : Bits.mremapMayMove | Bits.mremapFixed
                return try ask(process, request)
            case .load(let process, let page, let word): return try access(process, page, word, nil)
            case .store(let process, let page, let word, let value): return try access(process, page, word, value)
            case .fork(let process, let child):
                var request = fl_host_call()
                request.operation = UInt32(fl_host_fork)
                request.argument = UInt64(child)
                let answer = try ask(process, request)
                if case .value = answer { return .done }
                return answer
            case .end(let process):
                fl_host_end(host, Int32(process))
                return .done
            case .truncate(let file, let bytes):
                return Self.answer(fl_host_truncate(host, Int32(file), UInt64(bytes)))
            case .punchHole(let file, let pages):
                return Self.answer(
                    fl_host_punch(
                        host, Int32(file), UInt64(pages.lowerBound) * pageSize, UInt64(pages.count) * pageSize))
            case .readFile(let file, let page, let word):
                var value: UInt64 = 0
                let got = fl_host_read_file(host, Int32(file), UInt64(page) * pageSize + UInt64(word * 8), 8, &value)
                return Self.transferred(got, value)
            case .writeFile(let file, let page, let word, let value):
                let done = fl_host_write_file(host, Int32(file), UInt64(page) * pageSize + UInt64(word * 8), 8, value)
                return Self.transferred(done, value)
            }
        }

        private static func transferred(_ bytes: Int32, _ value: UInt64) -> HostAnswer {
            if bytes < 0 { return answer(-bytes) }
            return bytes == 8 ? .value(value) : .short(Int(bytes))
        }

        private func bits(_ protection: Protection) -> UInt64 {
            UInt64(
                (protection.read ? PROT_READ : 0) | (protection.write ? PROT_WRITE : 0)
                    | (protection.execute ? PROT_EXEC : 0))
        }

        private func request(_ operation: Int, _ pages: Range<Int>) -> fl_host_call {
            var call = fl_host_call()
            call.operation = UInt32(operation)
            call.file = -1
            call.address = Self.address(pages.lowerBound)
            call.length = UInt64(pages.count) * pageSize
            return call
        }

        private typealias Bits = SystemCalls.Bits

        private func request(_ raw: RawCall) -> fl_host_call {
            var call = fl_host_call()
            let operation =
                switch raw.name {
                case .mmap: fl_host_map
                case .munmap: fl_host_unmap
                case .mprotect: fl_host_protect
                case .madvise: fl_host_advise
                case .mremap: fl_host_remap
                }
            call.operation = UInt32(operation)
            call.file = Int32(raw.file ?? -1)
            call.address = raw.address
            call.length = raw.length
            call.argument = raw.argument
            call.value = raw.name == .mremap ? raw.argument : raw.flags
            call.flags = raw.flags
            call.offset = raw.last
            return call
        }

        private func access(
            _ process: Int, _ page: Int, _ word: Int, _ value: UInt64?
        ) throws(Broken) -> HostAnswer {
            var call = request(value == nil ? fl_host_load : fl_host_store, page..<page + 1)
            call.address += UInt64(word * 8)
            call.argument = 8
            call.value = value ?? 0
            let answer = try ask(process, call)
            if case .done = answer { return .value(value ?? 0) }
            return answer
        }

        private func ask(_ process: Int, _ call: fl_host_call) throws(Broken) -> HostAnswer {
            var call = call
            var answer = fl_host_answer()
            let failed = fl_host_do(host, Int32(process), &call, &answer)
            if failed != 0 { throw Broken(reason: "process \(process) does not answer: errno \(failed)") }
            if answer.signal == SIGSEGV { return .segmentationFault }
            if answer.signal == SIGBUS { return .busError }
            if answer.error != 0 { return Self.answer(answer.error) }
            let operation = Int(call.operation)
            return operation == fl_host_load || operation == fl_host_fork
                ? .value(answer.value) : .done
        }

        private static func answer(_ errno: Int32) -> HostAnswer {
            errno == 0 ? .done : Errno(rawValue: errno).map { .error($0) } ?? .unknownError(errno)
        }

        /// The window as `process` sees it; its areas only where asked for, since that is dear.
        func look(_ process: Int, areas wanted: Bool) throws(Broken) -> [PageView] {
            var views = [PageView](repeating: PageView(), count: fl_host_pages)
            var entries = [UInt64](repeating: 0, count: views.count)
            let failed = fl_host_pagemap(host, Int32(process), &entries)
            if failed != 0 { throw Broken(reason: "no pagemap of process \(process): errno \(failed)") }
            for (page, entry) in entries.enumerated() {
                views[page].isPresent = entry >> 63 & 1 == 1
                views[page].isSwapped = entry >> 62 & 1 == 1
                views[page].isGuard = entry >> 58 & 1 == 1
                views[page].isFile = entry >> 61 & 1 == 1
                views[page].isExclusive = entry >> 56 & 1 == 1
            }
            guard wanted else { return views }
            var areas = [UInt16](repeating: 0, count: views.count)
            let unread = fl_host_areas(host, Int32(process), &areas)
            if unread != 0 { throw Broken(reason: "no smaps of process \(process): errno \(unread)") }
            for (page, bits) in areas.enumerated() where bits != 0 { views[page].area = Self.area(Int(bits)) }
            return views
        }

        private static func area(_ bits: Int) -> PageView.Area {
            func has(_ bit: Int) -> Bool { bits & bit != 0 }
            var area = PageView.Area()
            area.rights = Protection(
                read: has(fl_area_read), write: has(fl_area_write), execute: has(fl_area_execute))
            area.isShared = has(fl_area_shared)
            area.isAccounted = has(fl_area_accounted)
            area.hugePage = has(fl_area_huge)
            area.noHugePage = has(fl_area_no_huge)
            area.isMergeable = has(fl_area_mergeable)
            area.isLocked = has(fl_area_locked)
            area.mayHoldGuards = has(fl_area_guarded)
            area.isFirst = has(fl_area_first)
            return area
        }
    }
#endif
