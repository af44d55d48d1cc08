import Audit
import Frames
import HostMemory
import Synchrony

/// What the host does on its own, and pins.
extension World {
    func performInBackground(_ action: Action) throws(Errno) {
        switch action {
        case .reclaim(let pages): host.reclaim(pages: pages)
        case .migrate(let region, let offset, let length): host.migrate(addressSpace, range(region, offset, length))
        case .compact(let order): if !host.compact(order: order) { throw .ENOMEM }
        case .mergePages: host.mergeSamePages()
        case .collapsePages: host.collapseHugePages()
        case .reap: if !addressSpace.reap() { throw .EAGAIN }
        case .hintNUMA(let region, let offset, let length): addressSpace.hintNUMA(range(region, offset, length))
        case .breakMemory(let region, let offset): try breakMemory(address(region, offset))
        case .failAllocation(let count): host.memory.failAllocation(count)
        case .failTransfer(let region, let write): try failTransfer(region, write: write)
        case .signal(let signal): send(signal)
        default: throw .EINVAL
        }
    }

    /// Errors: ENOENT without a region that wants it; EAGAIN, where one task plays all parts, for a wait in vain; what the
    /// calls give.
    func serveUserFault(_ action: Action) throws(Errno) {
        guard let userFaults else { throw .ENOENT }
        switch action {
        case .userFaultWait:
            let message = isSequential ? userFaults.nextMessage() : userFaults.waitForMessage()
            if message == nil { throw .EAGAIN }
        case .userFaultCopy(let region, let offset, let value):
            let page = UnsafeMutableRawPointer.allocate(byteCount: Int(pageSize), alignment: 8)
            defer { page.deallocate() }
            page.initializeMemory(as: UInt64.self, repeating: 0, count: Int(pageSize / 8))
            page.storeBytes(of: value, as: UInt64.self)
            try userFaults.copy(page, to: address(region, offset))
        case .userFaultZero(let region, let offset): try userFaults.zero(address(region, offset))
        case .userFaultContinue(let region, let offset): try userFaults.map(address(region, offset))
        case .userFaultProtect(let region, let offset, let length, let on):
            try userFaults.protect(range(region, offset, length), on)
        default: throw .EINVAL
        }
    }

    private func send(_ signal: SignalName) {
        switch signal {
        case .plain: addressSpace.signals.pending = true
        case .fatal: addressSpace.signals.fatal = true
        case .handled: addressSpace.signals.pending = false
        }
    }

    /// Kernel: `free_hugepages` and `resv_hugepages` of `/sys/kernel/mm/hugepages`.
    func countHugePages(_ level: PageLevel, reserved: Bool) throws(Errno) -> UInt64 {
        guard let pool = pools.first(where: { $0.level == level }) else { throw .ENOENT }
        let idle = pool.idle
        return UInt64(reserved ? idle.reserved : idle.free)
    }

    /// What belongs to a pool of huge pages is the pool's to count.
    private func breakMemory(_ address: UserAddress) throws(Errno) {
        guard let frame = addressSpace.translate(address)?.frame, host.memory.hasPageFrame(frame) else { throw .EFAULT }
        let isSingle = !pools.contains { $0.contains(frame) }
        if host.poison(frame), isSingle { brokenFrames += 1 }
    }

    private func failTransfer(_ region: Int?, write: Bool) throws(Errno) {
        guard let region else {
            guard let swap = host.swap else { throw .ENXIO }
            return swap.failNext(reads: write ? 0 : 1, writes: write ? 1 : 0)
        }
        guard case .object(let object) = regions[region].behind, let disk = object.disk else { throw .EINVAL }
        disk.failNext(reads: write ? 0 : 1, writes: write ? 1 : 0)
    }

    /// Errors: what get-user-pages answers, as the errno of the call that asked.
    func pin(_ address: UserAddress, write: Bool) throws(Errno) {
        do throws(GetUserPagesError) {
            let flags = LookupFlags(write: write, longTerm: true)
            pins.append(HeldPin(address, try addressSpace.pinUserPageUnlocked(address, flags, holder: .driver)))
        } catch {
            switch error {
            case .noMemory: throw .ENOMEM
            case .interrupted, .again: throw .EINTR
            case .hardwarePoison: throw .EHWPOISON
            case .wouldBlock, .fault, .exists, .remoteIO: throw .EFAULT
            }
        }
    }

    /// Error: EINVAL, if nothing is pinned there.
    func unpin(_ address: UserAddress) throws(Errno) {
        guard let index = pins.firstIndex(where: { $0.address == address }) else { throw .EINVAL }
        pins.remove(at: index).release()
    }
}

extension AdviceName {
    var advice: Advice {
        switch self {
        case .free: .free
        case .cold: .cold
        case .pageOut: .pageOut
        case .collapse: .collapse
        case .mergeable: .mergeable
        case .unmergeable: .unmergeable
        case .hugePage: .hugePage
        case .noHugePage: .noHugePage
        case .populateRead: .populateRead
        case .populateWrite: .populateWrite
        case .remove: .remove
        case .guardInstall: .guardInstall
        case .guardRemove: .guardRemove
        }
    }
}
