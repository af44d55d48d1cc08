import Frames
import Machine
import TextInput

/// The steps on dirty rings, private memory, frame caches, and faults ahead of use and asynchronous ones.
extension PhaseBuilder {
    static let machineWords = [
        "collect_ring", "reset_rings", "set_private", "set_shared", "punch_private", "cache_write", "cache_read",
        "prefault",
        "async_fetch",
    ]
    /// Steps that need a slot's bitmap.
    static let bitmapWords = ["get_dirty_log", "clear_dirty_log", "precopy", "snapshot"]

    func complainOfBitmap(_ field: Field) -> Action? {
        complaints.add(
            field.keyPosition, "`\(field.key.name)` in a VM with dirty rings",
            "its slots have no bitmaps, and KVM answers ENXIO: use `collect_ring` and `reset_rings`")
        return nil
    }

    /// Nil: it was complained about.
    mutating func machineAction(_ field: Field, _ fields: Fields, _ answer: AnswerReading) -> Action? {
        let name = field.key.name
        switch (name, field.reading) {
        case ("collect_ring", .number(let cpu)): return collect(Int(cpu), field)
        case ("reset_rings", _):
            return answer.mayBeError || usesRings(field) ? .resetRings : nil
        case ("async_fetch", _): return isUnder(.asyncWorker, field) ? .fetchPage : nil
        case (_, .guestPlace(let place)):
            guard let address = layout.address(place, at: field.position, regions) else { return nil }
            if name.hasPrefix("cache_") { return cacheAction(field, address, fields) }
            return stretchAction(field, address, fields, answer)
        default: return nil
        }
    }

    // MARK: Dirty rings

    private mutating func collect(_ cpu: Int, _ field: Field) -> Action? {
        guard usesRings(field) else { return nil }
        if cpu >= virtualCPUs {
            complaints.add(
                field.position, "there is no vCPU \(cpu)", "the last is \(virtualCPUs - 1); raise `vm: {vcpus: ...}`")
            return nil
        }
        return .collectRing(cpu: cpu)
    }

    /// A reader of rings belongs to one task.
    private mutating func usesRings(_ field: Field) -> Bool {
        guard hasRings else {
            complaints.add(
                field.keyPosition, "`\(field.key.name)` in a VM without dirty rings",
                "add `dirty_ring: 64 KiB` to `vm`")
            return false
        }
        if let ringUser, ringUser != actor {
            complaints.add(
                field.keyPosition, "a second task of the phase that reads dirty rings",
                "one task of the VMM collects and resets")
            return false
        }
        ringUser = actor
        return true
    }

    // MARK: Guest memory, page by page

    private func stretchAction(
        _ field: Field, _ address: UInt64, _ fields: Fields, _ answer: AnswerReading
    ) -> Action? {
        let slot = layout.duringPhase.first { $0.guestRange.contains(address) }
        guard let length = fields.number("length") ?? slot.map({ $0.guestRange.upperBound - address }) else {
            complaints.add(
                field.position, "\(Quantity.hex(address)) is in no slot", "say how much by `length: 4 KiB`")
            return nil
        }
        guard answer.mayBeError || isWhole(address, length, field, fields) else { return nil }
        let guest = GuestAddress(address)
        switch field.key.name {
        case "prefault": return .preFault(at: guest, size: length)
        case "punch_private":
            guard answer.mayBeError || hasFile(slot, address, field) else { return nil }
            return .punchPrivate(at: guest, size: length)
        default:
            guard answer.mayBeError || canBePrivate(field) else { return nil }
            return .setAttributes(at: guest, size: length, isPrivate: field.key.name == "set_private")
        }
    }

    private func isWhole(_ address: UInt64, _ length: UInt64, _ field: Field, _ fields: Fields) -> Bool {
        let isWhole = (address | length) % pageSize == 0 && length > 0
        guard !isWhole || length > (1 << layout.architecture.guestAddressBits) - min(address, 1 << 62) else {
            return true
        }
        complaints.add(
            fields["length"]?.position ?? field.position,
            "`\(field.key.name)` can't be of \(Quantity.shown(length)) from \(Quantity.hex(address)) on",
            "whole pages, not none, up to the end of the guest's addresses; else say `expect: EINVAL`")
        return false
    }

    private func hasFile(_ slot: SlotPlan?, _ address: UInt64, _ field: Field) -> Bool {
        if slot?.guestMemory == true { return true }
        complaints.add(
            field.position, "no slot with private memory shows \(Quantity.hex(address))",
            "give the slot `guest_memfd: true`")
        return false
    }

    private func canBePrivate(_ field: Field) -> Bool {
        if hasPrivateMemory { return true }
        complaints.add(
            field.keyPosition, "`\(field.key.name)` in a VM without private memory",
            "add `type: sw_protected` to `vm`, or say `expect: EINVAL`")
        return false
    }

    private func cacheAction(_ field: Field, _ address: UInt64, _ fields: Fields) -> Action? {
        guard isUnder(.kvm, field), isAligned(address, at: field.position) else { return nil }
        let guest = GuestAddress(address)
        if field.key.name == "cache_read" { return .cacheLoad(at: guest) }
        return .cacheStore(at: guest, value: fields.number("value") ?? 1)
    }

    private func isUnder(_ task: BackgroundTask, _ field: Field) -> Bool {
        if actor == .background(task) { return true }
        complaints.add(
            field.keyPosition, "`\(field.key.name)` outside of `\(task.name):`", "put it under `\(task.name):`")
        return false
    }
}
