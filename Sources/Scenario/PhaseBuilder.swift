import Frames
import Machine
import TextInput

/// The second stage for `phases`: steps become actions, checked along the order in which they are written.
struct PhaseBuilder {
    let complaints: Complaints
    let regions: [RegionPlan]
    /// Whether the host knows its pages' age; whether it has a swap device.
    let reclaims: Bool
    let swaps: Bool
    let virtualCPUs: Int
    var layout: GuestLayout
    /// Children that live.
    var children = 0
    private var consumers: ConsumerBuilder
    /// Whether the VM has dirty rings, and no bitmaps; whether it has private memory.
    let hasRings: Bool
    let hasPrivateMemory: Bool
    /// Who has read rings in this phase.
    var ringUser: TaskPlan.Actor?
    /// Whose steps are being read.
    private(set) var actor = TaskPlan.Actor.host
    /// Device memory is never used twice, so that a stale mapping of it shows.
    private var deviceFramesLeft: UInt64

    init(_ complaints: Complaints, _ plan: Plan, _ layout: GuestLayout) {
        self.complaints = complaints
        consumers = ConsumerBuilder(complaints)
        regions = plan.regions
        reclaims = plan.reclaims
        swaps = plan.swapPages > 0
        virtualCPUs = plan.virtualCPUs
        hasRings = plan.dirtyRingBytes > 0
        hasPrivateMemory = plan.hasPrivateMemory
        deviceFramesLeft = UInt64(plan.deviceFrames) - plan.regions.reduce(0) { $0 + $1.frames.device }
        self.layout = layout
    }

    mutating func phase(_ fields: Fields, number: Int) -> PhasePlan {
        var phase = PhasePlan()
        phase.name = Array((fields.text("name") ?? "phase \(number)").utf8)
        layout.beginPhase()
        ringUser = nil
        for field in fields.fields {
            guard case .list(let steps) = field.reading else { continue }
            var task = TaskPlan()
            if field.key.numbered {
                task.actor = virtualCPU(field)
            } else if let background = BackgroundTask.allCases.first(where: { "\($0.name)" == field.key.name }) {
                task.actor = .background(background)
            }
            actor = task.actor
            task.steps = steps.compactMap { step($0) }
            phase.tasks.append(task)
        }
        if phase.tasks.isEmpty {
            complaints.add(fields.position, "a phase in which nobody does anything", "add `vcpu0:` or `host:`")
        }
        return phase
    }

    private func virtualCPU(_ field: Field) -> TaskPlan.Actor {
        let number = Vocabulary.decimal(field.word.dropFirst(field.key.name.count)) ?? 0
        guard number < UInt64(virtualCPUs) else {
            complaints.add(
                field.keyPosition, "there is no `\(field.word)`",
                "the VM has \(virtualCPUs == 1 ? "one vCPU, vcpu0" : "\(virtualCPUs) vCPUs"); raise `vm: {vcpus: ...}`")
            return .virtualCPU(0)
        }
        return .virtualCPU(Int(number))
    }

    private mutating func step(_ fields: Fields) -> StepPlan? {
        guard let field = fields.action else { return nil }
        var answer = AnswerReading(expectation: .success)
        if case .answer(let given)? = fields["expect"]?.reading { answer = given }
        guard let action = action(field, fields, answer) else { return nil }
        var step = StepPlan(action)
        step.line = field.keyPosition.line
        step.expectation = answer.expectation
        step.exceptions = answer.exceptions
        return step
    }

    private mutating func action(_ field: Field, _ fields: Fields, _ answer: AnswerReading) -> Action? {
        if Self.backgroundWords.contains(field.key.name) { return backgroundAction(field) }
        if hasRings && !answer.mayBeError && Self.bitmapWords.contains(field.key.name) {
            return complainOfBitmap(field)
        }
        if Self.tableWords.contains(field.key.name) { return tableAction(field, fields) }
        if Self.machineWords.contains(field.key.name) { return machineAction(field, fields, answer) }
        if ConsumerBuilder.words.contains(field.key.name) { return consumers.action(field, by: actor, answer) }
        switch field.reading {
        case .guestPlace(let place): return guestAction(field, place, fields, answer)
        case .regionPlace(let place): return regionAction(field, place, fields, answer)
        case .fields(let slot): return setMemoryRegion(field, slot, answer)
        case .number(let id): return slotAction(field, UInt16(clamping: id), fields, answer)
        default: return plainAction(field)
        }
    }

    // MARK: Guest addresses

    private mutating func guestAction(
        _ field: Field, _ place: GuestPlace, _ fields: Fields, _ answer: AnswerReading
    ) -> Action? {
        guard let address = layout.address(place, at: field.position, regions) else { return nil }
        let guest = GuestAddress(address)
        let forWriting = fields.words("access").first != "read"
        switch field.key.name {
        case "map_guest_page": return .mapGuestPage(at: guest, write: forWriting)
        case "get_guest_page": return .getGuestPage(at: guest, write: forWriting)
        default: break
        }
        let kind: AccessKind = field.key.name == "write" ? .write : field.key.name == "read" ? .read : .execute
        let count = fields.number("count") ?? 1
        let stride = fields.number("stride") ?? pageSize
        let value = kind == .write ? fields.number("value") ?? 1 : 0
        guard isAligned(address, at: field.position), checkStride(stride, fields) else { return nil }
        layout.checkAccesses(
            kind, address, count: count, stride: stride, mayMissMemory: answer.mayMissMemory, at: field.position)
        return .guest(kind, at: guest, count: Int(count), stride: stride, value: value)
    }

    func isAligned(_ address: UInt64, at position: Position) -> Bool {
        guard address % 8 != 0 else { return true }
        complaints.add(
            position, "\(Quantity.hex(address)) is not 8-byte aligned",
            "an access has 8 bytes; the aligned address before it is \(Quantity.hex(address & ~7))")
        return false
    }

    private func checkStride(_ stride: UInt64, _ fields: Fields) -> Bool {
        guard stride == 0 || stride % 8 != 0 else { return true }
        complaints.add(
            fields.position(of: "stride"), "a stride can't be \(Quantity.shown(stride))",
            "accesses are of 8 bytes and 8-byte aligned: 8, 16, ..., 4 KiB")
        return false
    }

    // MARK: Regions

    private mutating func regionAction(
        _ field: Field, _ place: RegionPlace, _ fields: Fields, _ answer: AnswerReading
    ) -> Action? {
        guard let region = layout.regionIndex(place.region, at: field.position, regions),
            suits(field, regions[region], answer)
        else { return nil }
        let name = field.key.name
        switch name {
        case "move": return move(field, region, fields)
        case "evict": return .evictBuffer(region: region)
        case "free": return .freeBuffer(region: region)
        case "disable": return .disableDevice(region: region)
        case "reset": return .resetDevice(region: region)
        case "fsync": return .writeBack(region: region)
        case "fail_fault": return failFaults(region, fields)
        case "truncate": return truncate(field, region, fields)
        case "fail_disk": return .failTransfer(region: region, write: fields.words("transfer").first == "write")
        default: break
        }
        guard place.offset < regions[region].size else {
            complaints.add(
                field.position, "\(Quantity.shown(place.offset)) is beyond the end of `\(place.region)`",
                "`\(place.region)` has \(Quantity.shown(regions[region].size))")
            return nil
        }
        if Self.rangeWords.contains(name) {
            return rangeAction(field, region, place.offset, fields)
        }
        if name == "map_blob" || name == "unmap_blob" { return windowAction(field, region, place.offset, fields) }
        return wordAction(field, region, place.offset, fields)
    }

    private static let rangeWords = [
        "munmap", "mprotect", "madvise", "mremap", "age", "punch_hole", "migrate", "numa_hint", "uffd_protect",
        "uffd_unprotect",
    ]

    private func truncate(_ field: Field, _ region: Int, _ fields: Fields) -> Action? {
        let size = fields.number("size") ?? 0
        // Blocks of persistent memory are whole pages; a page cache ends at any byte.
        let isAnySize = regions[region].kind != .daxFile
        guard isAnySize || size % pageSize == 0, size <= regions[region].size else {
            complaints.add(
                fields.position(of: "size"), "`truncate` can't make it \(Quantity.shown(size))",
                (isAnySize ? "" : "a multiple of 4 KiB, ")
                    + "at most \(Quantity.shown(regions[region].size)), the size of the mapping")
            return nil
        }
        return .truncate(region: region, size: size)
    }

    /// Offsets that virtio-gpu refuses are a step's to try: KVM's user sees EINVAL.
    private func windowAction(_ field: Field, _ window: Int, _ offset: UInt64, _ fields: Fields) -> Action? {
        guard field.key.name == "map_blob" else { return .unmapBlob(window: window, offset: offset) }
        guard let place = fields.regionPlace("resource"),
            let resource = layout.regionIndex(place.region, at: fields.position(of: "resource"), regions)
        else { return nil }
        guard [.graphicsBuffer, .sharedMemory, .privateObject].contains(regions[resource].kind) else {
            complaints.add(
                fields.position(of: "resource"), "`\(place.region)` can't be mapped into a blob window",
                "a `graphics_buffer` or a `memfd` can")
            return nil
        }
        return .mapBlob(window: window, offset: offset, resource: resource)
    }

    private func suits(_ field: Field, _ region: RegionPlan, _ answer: AnswerReading) -> Bool {
        guard let shape = field.key.step, !shape.kinds.contains(region.kind) else { return true }
        if shape.triesOtherKinds && answer.mayBeError { return true }
        let remedy = shape.triesOtherKinds ? "; elsewhere Linux answers EINVAL: say `expect: EINVAL`" : ""
        complaints.add(
            field.position,
            "`\(field.key.name)` is not for `\(region.shownName)`, which is `\(Vocabulary.word(region.kind))`",
            "it is for: \(shape.kinds.map(Vocabulary.word).joined(separator: ", "))" + remedy)
        return false
    }

    private mutating func move(_ field: Field, _ region: Int, _ fields: Fields) -> Action? {
        let toDevice = fields.words("to").first == "device_memory"
        guard toDevice else { return .moveBuffer(region: region, toDeviceMemory: false) }
        let need = regions[region].size / pageSize
        guard need <= deviceFramesLeft else {
            complaints.add(
                field.position, "`\(regions[region].shownName)` doesn't fit the host's device memory",
                "\(Quantity.shown(deviceFramesLeft * pageSize)) are left for it, since moves never use a frame twice; "
                    + "raise `host: {device_memory: ...}`")
            return nil
        }
        deviceFramesLeft -= need
        return .moveBuffer(region: region, toDeviceMemory: true)
    }

    private func rangeAction(_ field: Field, _ region: Int, _ offset: UInt64, _ fields: Fields) -> Action? {
        let rest = regions[region].size - offset
        let length = fields.number("length") ?? rest
        guard offset % pageSize == 0 else {
            complaints.add(
                field.position, "`\(field.key.name)` can't begin at \(Quantity.shown(offset))",
                "it begins at a multiple of 4 KiB")
            return nil
        }
        guard length > 0, length <= rest, length % pageSize == 0 else {
            complaints.add(
                fields.position(of: "length"), "`\(field.key.name)` can't have a length of \(Quantity.shown(length))",
                "a multiple of 4 KiB, not zero, at most \(Quantity.shown(rest)) to the end of the region")
            return nil
        }
        switch field.key.name {
        case "munmap": return .munmap(region: region, offset: offset, length: length)
        case "madvise": return advise(region, offset, length, fields)
        case "mremap": return moveMapping(region, offset, length, fields)
        case "migrate":
            return checkReclaims(field) ? .migrate(region: region, offset: offset, length: length) : nil
        case "numa_hint": return .hintNUMA(region: region, offset: offset, length: length)
        case "uffd_protect", "uffd_unprotect":
            return .userFaultProtect(
                region: region, offset: offset, length: length, on: field.key.name == "uffd_protect")
        case "punch_hole": return .punchHole(region: region, offset: offset, length: length)
        case "age": return .age(region: region, offset: offset, length: length)
        default:
            let (read, write) = Vocabulary.rights(fields.words("protection").first)
            return .mprotect(region: region, offset: offset, length: length, read: read, write: write)
        }
    }

    private func wordAction(_ field: Field, _ region: Int, _ offset: UInt64, _ fields: Fields) -> Action? {
        guard isAligned(offset, at: field.position) else { return nil }
        switch field.key.name {
        case "pin": return .pin(region: region, offset: offset, write: fields.words("access").first != "read")
        case "unpin": return .unpin(region: region, offset: offset)
        case "uffd_zeropage": return .userFaultZero(region: region, offset: offset)
        case "uffd_continue": return .userFaultContinue(region: region, offset: offset)
        case "uffd_copy":
            return .userFaultCopy(region: region, offset: offset, value: fields.number("value") ?? 1)
        case "memory_failure": return .breakMemory(region: region, offset: offset)
        default: break
        }
        let value = fields.number("value") ?? 1
        if field.key.name.hasPrefix("child_") && !hasChild(field) { return nil }
        switch field.key.name {
        case "store": return .store(region: region, offset: offset, value: value)
        case "vmm_store": return .ownStore(region: region, offset: offset, value: value)
        case "dma_store": return .deviceStore(region: region, offset: offset, value: value)
        case "load": return .load(region: region, offset: offset)
        case "child_store": return .childStore(region: region, offset: offset, value: value)
        case "child_load": return .childLoad(region: region, offset: offset)
        case "driver_store": return .driverStore(region: region, offset: offset, value: value)
        default: return .driverLoad(region: region, offset: offset)
        }
    }

    // MARK: Without a place

    private func hasChild(_ field: Field) -> Bool {
        if children > 0 { return true }
        complaints.add(field.keyPosition, "`\(field.key.name)` without a child", "a step `- fork` comes before it")
        return false
    }

    private mutating func plainAction(_ field: Field) -> Action? {
        switch field.key.name {
        case "fork":
            children += 1
            return .fork
        case "child_exit":
            guard hasChild(field) else { return nil }
            children -= 1
            return .childExit
        default:
            if case .words = field.reading { return .enableManualProtect(initiallySet: true) }
            return .enableManualProtect(initiallySet: false)
        }
    }
}
