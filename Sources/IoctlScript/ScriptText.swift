import CKVMInterface

// A script back as text: what reading it gives is the same script, but for comments and the numbers of lines.

extension Script {
    /// One line for each step, after the line that names the language.
    public var source: String {
        var text = "# faultline ioctl \(ScriptReader.version)\n"
        for line in lines { text += source(of: line) + "\n" }
        return text
    }

    /// One line.
    public func source(of line: Line) -> String {
        line.step.source(names) + (line.process == 0 ? "" : " as=\(names.processes[line.process])")
    }

    /// The same steps, numbered as `source` prints them.
    public var renumbered: Script {
        var script = self
        for index in script.lines.indices { script.lines[index].number = index + 2 }
        return script
    }
}

extension Step {
    fileprivate func source(_ names: Names) -> String {
        switch self {
        case .host, .map, .unmap, .protect, .advise, .remap, .truncate, .punchHost, .load, .store, .splice,
            .drain, .fork, .exit:
            hostSource(names)
        default: machineSource(names)
        }
    }

    private func hostSource(_ names: Names) -> String {
        switch self {
        case .host(let region, let kind, let size, let rights):
            "host name=\(names.regions[region]) kind=\(kind.rawValue) size=\(hexText(size)) prot=\(rights.letters)"
        case .map(let place, let length, let rights, let source, let replaces):
            "mmap \(names.host(place)) length=\(hexText(length)) prot=\(rights.letters)"
                + names.source(source) + (replaces ? "" : " noreplace=yes")
        case .unmap(let place, let length): "munmap \(names.host(place)) length=\(hexText(length))"
        case .protect(let place, let length, let rights):
            "mprotect \(names.host(place)) length=\(hexText(length)) prot=\(rights.letters)"
        case .advise(let place, let length, let advice):
            "madvise \(names.host(place)) length=\(hexText(length)) advice=\(advice.name)"
        case .remap(let place, let length, let newLength, let target):
            "mremap \(names.host(place)) length=\(hexText(length)) new_length=\(hexText(newLength))"
                + (target.map { " to=\(names.place($0))" } ?? "")
        case .truncate(let region, let size): "truncate host=\(names.regions[region]) size=\(hexText(size))"
        case .punchHost(let region, let offset, let length):
            "punch host=\(names.regions[region]) offset=\(hexText(offset)) length=\(hexText(length))"
        case .load(let place, let repetition): "load \(names.host(place))\(repetition.source)"
        case .store(let place, let repetition, let value):
            "store \(names.host(place))\(repetition.source) value=\(hexText(value))"
        case .splice(let place): "vmsplice \(names.host(place))"
        case .drain: "drain"
        case .fork(let process): "process name=\(names.processes[process])"
        case .exit: "exit"
        default: preconditionFailure("no call of the host")
        }
    }

    private func machineSource(_ names: Names) -> String {
        switch self {
        case .createVM(let vm, let type): "vm name=\(names.vms[vm]) type=\(word(type, in: ScriptReader.vmTypes))"
        case .createCPU(let cpu, let id): "vcpu vm=\(names.vms[cpu.vm]) id=\(id)"
        case .close(.vm(let vm)): "close vm=\(names.vms[vm])"
        case .close(.cpu(let cpu)): "close \(names.cpu(cpu))"
        case .close(.memfd(let memfd)): "close memfd=\(names.memfds[memfd])"
        case .setRegion(let vm, let region, let version): region.source(names, vm, version)
        case .getDirtyLog(let vm, let slot, let hasBuffer):
            "get_dirty_log vm=\(names.vms[vm]) slot=\(slotText(slot))" + (hasBuffer ? "" : " bitmap=null")
        case .clearDirtyLog(let vm, let pages): "clear_dirty_log vm=\(names.vms[vm]) \(pages.source)"
        case .enableCapability(let vm, let capability, let flags, let arguments):
            "enable_cap vm=\(names.vms[vm]) cap=\(word(capability, in: capabilities))"
                + (flags == 0 ? "" : " flags=\(hexText(flags))")
                + (arguments.isEmpty ? "" : " args=" + arguments.map(hexText).joined(separator: ","))
        case .checkExtension(let vm, let capability):
            "check_extension " + (vm.map { "vm=\(names.vms[$0])" } ?? "of=device")
                + " cap=\(word(capability, in: capabilities))"
        case .createMemfd(let vm, let memfd, let size, let flags):
            "memfd vm=\(names.vms[vm]) name=\(names.memfds[memfd]) size=\(hexText(size))"
                + (flags == 0 ? "" : " flags=\(hexText(flags))")
        case .allocate(let memfd, let mode, let offset, let length):
            "allocate memfd=\(names.memfds[memfd]) mode=\(mode) offset=\(hexText(offset)) length=\(hexText(length))"
        case .setAttributes(let vm, let address, let size, let attributes, let flags):
            "attributes vm=\(names.vms[vm]) gpa=\(hexText(address)) size=\(hexText(size))"
                + " attributes=\(hexText(attributes))" + (flags == 0 ? "" : " flags=\(hexText(flags))")
        case .preFault(let cpu, let address, let size, let flags):
            "prefault \(names.cpu(cpu)) gpa=\(hexText(address)) size=\(hexText(size))"
                + (flags == 0 ? "" : " flags=\(hexText(flags))")
        case .collectRing(let cpu, let most): "ring_collect \(names.cpu(cpu)) max=\(most)"
        case .resetRings(let vm): "ring_reset vm=\(names.vms[vm])"
        case .withoutArgument(let vm, let call): "no_argument vm=\(names.vms[vm]) call=\(call.rawValue)"
        case .statistics(let vm, let cpu, let wanted):
            "stats vm=\(names.vms[vm])" + (cpu.map { " cpu=\(names.cpus[vm][$0])" } ?? "")
                + " names=" + wanted.joined(separator: ",")
        case .guest(let cpu, let access): "guest \(access.kind.rawValue) \(names.cpu(cpu)) \(access.source)"
        default: preconditionFailure("a call of the host")
        }
    }
}

private func slotText(_ slot: UInt64) -> String { slot >> 16 == 0 ? "\(slot)" : "\(slot >> 16):\(slot & 0xffff)" }

private func word(_ value: UInt64, in words: [(String, UInt64)]) -> String {
    words.first { $0.1 == value }?.0 ?? hexText(value)
}

extension Names {
    fileprivate func place(_ place: HostPlace) -> String {
        let base =
            switch place.base {
            case .null: "null"
            case .kernel: "kernel"
            case .region(let number): regions[number]
            }
        return place.offset == 0 ? base : "\(base)+\(hexText(place.offset))"
    }

    fileprivate func host(_ place: HostPlace) -> String {
        guard case .region(let number) = place.base else { return "host=\(self.place(place))" }
        return "host=\(regions[number]) offset=\(hexText(place.offset))"
    }

    fileprivate func source(_ source: MapSource) -> String {
        switch source {
        case .anonymous: ""
        case .sharedAnonymous: " source=shared_anonymous"
        case .object(let region, let offset): " source=\(regions[region]) source_offset=\(hexText(offset))"
        }
    }

    fileprivate func cpu(_ cpu: CPU) -> String { "vm=\(vms[cpu.vm]) cpu=\(cpus[cpu.vm][cpu.cpu])" }
}

extension Rights {
    fileprivate var letters: String {
        let letters = [(Rights.read, "r"), (.write, "w"), (.execute, "x")].filter { contains($0.0) }.map(\.1).joined()
        return letters.isEmpty ? "none" : letters
    }
}

extension Repetition {
    fileprivate var source: String {
        count == 1 && stride == 4096 ? "" : " count=\(count) stride=\(hexText(stride))"
    }
}

extension Region {
    fileprivate func source(_ names: Names, _ vm: Int, _ version: Int) -> String {
        var words: [String] = []
        for (name, bit) in ScriptReader.regionFlags where bit != 0 && flags & bit != 0 { words.append(name) }
        let rest = ScriptReader.regionFlags.reduce(flags) { $0 & ~$1.1 }
        if rest != 0 { words.append(hexText(rest)) }
        return "\(version == 1 ? "region" : "region2") vm=\(names.vms[vm]) slot=\(slotText(slot))"
            + (words.isEmpty ? "" : " flags=" + words.joined(separator: "|"))
            + " gpa=\(hexText(guestAddress)) size=\(hexText(size)) hva=\(names.place(userAddress))"
            + (memfd.map { " memfd=\(names.memfds[$0])" } ?? "")
            + (memfdOffset == 0 ? "" : " offset=\(hexText(memfdOffset))")
    }
}

extension ClearedPages {
    fileprivate var source: String {
        let text =
            switch bits {
            case .all: "all"
            case .missing: "null"
            case .words(let words): words.isEmpty ? "0" : Answer.Value.list(words).description
            }
        return "slot=\(slotText(slot)) first=\(first) count=\(count) bits=\(text)"
    }
}

extension GuestAccess {
    fileprivate var source: String {
        "gpa=\(hexText(address))" + (size == 8 ? "" : " size=\(size)") + repetition.source
            + (value == 0 ? "" : " value=\(hexText(value))") + (emulated ? " by=emulator" : "")
    }
}
