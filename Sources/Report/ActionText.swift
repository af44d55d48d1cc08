import Frames
import Machine

extension Architecture {
    /// The name in scenarios and on the command line.
    public var name: String {
        switch self {
        case .x86TDP: "x86-tdp"
        case .riscvSv39x4: "riscv-sv39x4"
        case .riscvSv48x4: "riscv-sv48x4"
        case .x86Shadow: "x86-shadow"
        case .x86TDPLegacy: "x86-tdp-legacy"
        }
    }
}

extension PolicyName {
    public var name: String {
        switch self {
        case .precise: "precise"
        case .tracked: "tracked"
        case .guess: "guess"
        }
    }
}

extension RegionKind {
    /// What the memory is, in the words of smaps and the mm.
    var describing: String {
        switch self {
        case .anonymous: "anonymous"
        case .sharedMemory: "shared memory"
        case .privateObject: "private object"
        case .graphicsBuffer: "graphics buffer, pf io"
        case .deviceBAR: "device BAR, pf io"
        case .reservedMemory: "reserved, pf io"
        case .countedPFNMap: "counted pages, pf"
        case .mixedMap: "mixed map, mm"
        case .writeNotifyPFNMap: "write-notify, pf io"
        case .daxFile: "DAX file"
        case .udmabuf: "udmabuf, pf"
        case .blobWindow: "blob window"
        case .file: "file"
        case .privateFile: "private file"
        case .secretMemory: "secret memory"
        case .hugeShared: "hugetlb"
        case .hugePrivate: "private hugetlb"
        }
    }
}

extension AdviceName {
    /// Without `MADV_`.
    var kernelName: String {
        switch self {
        case .free: "FREE"
        case .cold: "COLD"
        case .pageOut: "PAGEOUT"
        case .collapse: "COLLAPSE"
        case .mergeable: "MERGEABLE"
        case .unmergeable: "UNMERGEABLE"
        case .hugePage: "HUGEPAGE"
        case .noHugePage: "NOHUGEPAGE"
        case .populateRead: "POPULATE_READ"
        case .populateWrite: "POPULATE_WRITE"
        case .remove: "REMOVE"
        case .guardInstall: "GUARD_INSTALL"
        case .guardRemove: "GUARD_REMOVE"
        }
    }
}

extension DriverAnswer {
    var kernelName: String {
        switch self {
        case .busError: "VM_FAULT_SIGBUS"
        case .outOfMemory: "VM_FAULT_OOM"
        case .poisoned: "VM_FAULT_HWPOISON"
        case .retry: "VM_FAULT_RETRY"
        case .nothingInserted: "VM_FAULT_NOPAGE, and nothing is inserted"
        }
    }
}

extension SignalName {
    var sentence: String {
        switch self {
        case .plain: "a signal comes"
        case .fatal: "a fatal signal comes"
        case .handled: "the signal is handled"
        }
    }
}

/// An action in the words of the scenario.
package struct ActionText {
    let plan: Plan

    package init(plan: Plan) { self.plan = plan }

    package func describe(_ action: Action) -> String {
        switch action {
        case .guest(let kind, let at, let count, let stride, let value):
            return guest(kind, at, count, stride, value)
        case .load(let region, let offset): return "load \(place(region, offset))"
        case .store(let region, let offset, let value): return "store \(place(region, offset)) = \(address(value))"
        case .munmap(let region, let offset, let length): return "munmap \(stretch(region, offset, length))"
        case .mprotect(let region, let offset, let length, let read, let write):
            let rights = write ? "read-write" : read ? "read" : "none"
            return "mprotect \(stretch(region, offset, length)) \(rights)"
        case .madviseDontNeed(let region, let offset, let length):
            return "madvise(DONTNEED) \(stretch(region, offset, length))"
        case .advise(let region, let offset, let length, let advice):
            return "madvise(\(advice.kernelName)) \(stretch(region, offset, length))"
        case .moveMapping(let region, let offset, let length, let target, let targetOffset):
            return "mremap \(stretch(region, offset, length)) to \(place(target, targetOffset))"
        case .pin(let region, let offset, let write):
            return "pin \(place(region, offset)) for \(write ? "writing" : "reading")"
        case .unpin(let region, let offset): return "unpin \(place(region, offset))"
        case .userFaultWait: return "wait for a fault to serve"
        case .userFaultCopy(let region, let offset, let value):
            return "uffd_copy \(place(region, offset)) = \(address(value))"
        case .userFaultZero(let region, let offset): return "uffd_zeropage \(place(region, offset))"
        case .userFaultContinue(let region, let offset): return "uffd_continue \(place(region, offset))"
        case .userFaultProtect(let region, let offset, let length, let on):
            return "\(on ? "uffd_protect" : "uffd_unprotect") \(stretch(region, offset, length))"
        case .reclaim(let pages): return "reclaim \(pages) pages"
        case .migrate(let region, let offset, let length): return "migrate \(stretch(region, offset, length))"
        case .compact(let order): return "compact for order \(order)"
        case .mergePages: return "merge equal pages"
        case .collapsePages: return "collapse into huge pages"
        case .reap: return "take the dying process's memory"
        case .hintNUMA(let region, let offset, let length): return "numa_hint \(stretch(region, offset, length))"
        case .breakMemory(let region, let offset): return "the memory behind \(place(region, offset)) breaks"
        case .failAllocation(let count): return "allocation \(count) from now on fails"
        case .failTransfer(let region, let write):
            return "the next \(write ? "write to" : "read from") \(region.map(name) ?? "the swap device") fails"
        case .fork: return "fork"
        case .childStore(let region, let offset, let value):
            return "child stores \(place(region, offset)) = \(address(value))"
        case .childLoad(let region, let offset): return "child loads \(place(region, offset))"
        case .childExit: return "child exits"
        case .moveBuffer(let region, let device):
            return "move \(name(region)) to \(device ? "device memory" : "system memory")"
        case .evictBuffer(let region): return "evict \(name(region))"
        case .freeBuffer(let region): return "free \(name(region))"
        case .driverStore(let region, let offset, let value):
            return "driver stores \(place(region, offset)) = \(address(value))"
        case .driverLoad(let region, let offset): return "driver loads \(place(region, offset))"
        case .disableDevice(let region): return "disable \(name(region))"
        case .resetDevice(let region): return "reset \(name(region))"
        case .mapBlob(let window, let offset, let resource):
            return "map_blob \(place(window, offset)) shows \(name(resource))"
        case .unmapBlob(let window, let offset): return "unmap_blob \(place(window, offset))"
        case .truncate(let region, let size): return "truncate \(name(region)) to \(address(size))"
        case .punchHole(let region, let offset, let length):
            return "punch_hole \(stretch(region, offset, length))"
        case .writeBack(let region): return "fsync \(name(region))"
        case .failFault(let region, let answer, let count):
            return count == 0
                ? "\(name(region))'s faults work again"
                : "the next \(count == 1 ? "fault" : "\(count) faults") on \(name(region)): \(answer.kernelName)"
        case .signal(let signal): return signal.sentence
        case .countHugePages(let level, let reserved):
            return "\(reserved ? "resv" : "free")_hugepages of \(level.bytes >> 20) MiB"
        default: return ioctl(action)
        }
    }

    private func ioctl(_ action: Action) -> String {
        switch action {
        case .setMemoryRegion(let slot):
            var flags: [String] = []
            if slot.logDirtyPages { flags.append("log_dirty_pages") }
            if slot.readOnly { flags.append("readonly") }
            let tail = flags.isEmpty ? "" : " [" + flags.joined(separator: ", ") + "]"
            return "set_memory_region \(slot.id) at \(address(slot.guestAddress.value))\(tail)"
        case .deleteMemoryRegion(let id): return "delete_memory_region \(id)"
        case .getDirtyLog(let id): return "get_dirty_log \(id)"
        case .clearDirtyLog(let id, let first, let pages): return "clear_dirty_log \(id) pages \(first)+\(pages)"
        case .enableManualProtect(let set): return "enable_manual_protect" + (set ? " initially_set" : "")
        case .mapGuestPage(let at, let write): return "kvm_vcpu_map \(address(at.value)) \(write ? "write" : "read")"
        case .getGuestPage(let at, let write): return "gfn_to_page \(address(at.value)) \(write ? "write" : "read")"
        case .age(let region, let offset, let length): return "age \(stretch(region, offset, length))"
        case .precopy(let step): return "precopy \(step)"
        case .snapshot(let kind): return "snapshot \(kind == .full ? "full" : "diff")"
        case .restore: return "restore"
        case .collectRing, .resetRings, .setAttributes, .punchPrivate, .cacheStore, .cacheLoad, .preFault, .fetchPage:
            return machine(action)
        case .mapPage, .unmapPage, .protectPage, .restorePage, .flushPage, .loadCR3: return tables(action)
        case .ownStore(let region, let offset, let value):
            return "the VMM stores \(place(region, offset)) = \(address(value))"
        case .deviceStore(let region, let offset, let value):
            return "a device stores \(place(region, offset)) = \(address(value))"
        default: return ""
        }
    }

    private func machine(_ action: Action) -> String {
        func stretch(_ at: GuestAddress, _ size: UInt64) -> String { "\(address(at.value)) length \(address(size))" }
        switch action {
        case .collectRing(let cpu): return "collect the ring of vcpu\(cpu)"
        case .resetRings: return "reset_rings"
        case .setAttributes(let at, let size, let isPrivate):
            return "\(isPrivate ? "set_private" : "set_shared") \(stretch(at, size))"
        case .punchPrivate(let at, let size): return "punch_private \(stretch(at, size))"
        case .cacheStore(let at, let value): return "KVM's cache stores \(address(at.value)) = \(address(value))"
        case .cacheLoad(let at): return "KVM's cache loads \(address(at.value))"
        case .preFault(let at, let size): return "prefault \(stretch(at, size))"
        default: return "fetch a page for a vCPU"
        }
    }

    private func tables(_ action: Action) -> String {
        func entry(_ at: GuestAddress, _ level: UInt8) -> String {
            "\(address(at.value))" + (level == 1 ? "" : " at level \(level)")
        }
        switch action {
        case .mapPage(let at, let target, let level, let rights):
            return "map_page \(entry(at, level)) to \(address(target.value)) \(rights)"
        case .unmapPage(let at, let level): return "unmap_page \(entry(at, level))"
        case .protectPage(let at, let level, let rights): return "protect_page \(entry(at, level)) \(rights)"
        case .restorePage(let at, let level): return "restore_page \(entry(at, level))"
        case .flushPage(let at): return "invlpg \(address(at.value))"
        default: return "load_cr3"
        }
    }

    private func guest(
        _ kind: AccessKind, _ at: GuestAddress, _ count: Int, _ stride: UInt64, _ value: UInt64
    ) -> String {
        let verb =
            switch kind {
            case .read: "read"
            case .write: "write"
            case .execute: "fetch"
            }
        var text = "\(verb) \(address(at.value))"
        if kind == .write { text += " = \(address(value))" }
        if count > 1 { text += "  \(count) times, every \(address(stride))" }
        return text
    }

    private func name(_ region: Int) -> String { String(name: plan.regions[region].name) }
    private func place(_ region: Int, _ offset: UInt64) -> String { "\(name(region))+\(address(offset))" }
    private func stretch(_ region: Int, _ offset: UInt64, _ length: UInt64) -> String {
        offset == 0 && length == plan.regions[region].size
            ? name(region) : "\(name(region))+\(address(offset)) length \(address(length))"
    }
}

extension TaskPlan.Actor {
    /// As scenarios name it.
    package var text: String {
        switch self {
        case .virtualCPU(let number): "vcpu\(number)"
        case .host: "host"
        case .background(let task): "\(task.name)"
        }
    }
}

extension StepOutcome {
    package var text: String {
        switch self {
        case .done: "done"
        case .value(let value): "value \(address(value))"
        case .emulated: "store emulated"
        case .mmio: "KVM_EXIT_MMIO"
        case .dirtyRingFull: "KVM_EXIT_DIRTY_RING_FULL"
        case .memoryFault: "KVM_EXIT_MEMORY_FAULT"
        case .pageFault: "page fault of the guest"
        case .error(let errno): "\(errno)"
        case .pages(let pages): pages.isEmpty ? "no page" : "pages \(ranges(pages))"
        }
    }
}

extension StepExpectation {
    func text(repetition: Int) -> String {
        switch self {
        case .success: "success"
        case .value(let value): "value \(address(value))"
        case .anything: "anything"
        case .oneOf(let list): "one of: " + list.map { $0.text(repetition: repetition) }.joined(separator: "; ")
        case .counting(let from): "value \(address(from &+ UInt64(repetition)))"
        case .mmio: "KVM_EXIT_MMIO"
        case .dirtyRingFull: "KVM_EXIT_DIRTY_RING_FULL"
        case .memoryFault: "KVM_EXIT_MEMORY_FAULT"
        case .pageFault: "page fault of the guest"
        case .error(let errno): "\(errno)"
        case .pages(let pages): pages.isEmpty ? "no page" : "pages \(ranges(pages))"
        }
    }
}

/// `0..3, 7`.
func ranges(_ numbers: [UInt64]) -> String {
    var parts: [String] = []
    var i = 0
    while i < numbers.count {
        var j = i
        while j + 1 < numbers.count, numbers[j + 1] == numbers[j] + 1 { j += 1 }
        parts.append(i == j ? "\(numbers[i])" : "\(numbers[i])..\(numbers[j])")
        i = j + 1
    }
    return parts.joined(separator: ", ")
}
