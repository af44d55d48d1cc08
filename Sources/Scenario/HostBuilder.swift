import Frames
import Machine
import TextInput

/// The second stage for `host`: regions with their addresses, within the host's memory.
struct HostBuilder {
    /// Where assigned addresses begin: in user space on every host, away from what people write by hand.
    static let firstAddress: UInt64 = 0x7f00_0000_0000
    /// A model of a bigger host would be slow to look at and no clearer.
    static let memory: ClosedRange<UInt64> = (1 << 20)...(64 << 30)

    static let mostRegions = 1000

    let complaints: Complaints

    func build(_ host: Fields, into plan: inout Plan) {
        let memory = host.number("memory") ?? 16 << 20
        let deviceMemory = host.number("device_memory") ?? 0
        checkMemory(memory, deviceMemory, host)
        plan.ramFrames = Int(clamping: memory / pageSize)
        plan.deviceFrames = Int(clamping: deviceMemory / pageSize)
        plan.videoMemoryPages = graphicsLimit("vram", host)
        plan.graphicsSystemPages = graphicsLimit("graphics_system_memory", host)
        plan.transparentHugePages = host.flag("transparent_huge_pages")
        setSwap(host, &plan)
        setHugePages(host, &plan, memory: memory)
        let regions = host.list("regions")
        guard regions.count <= HostBuilder.mostRegions else {
            complaints.add(
                host.position(of: "regions"), "\(regions.count) regions", "at most \(HostBuilder.mostRegions)")
            return
        }
        for fields in regions { plan.regions.append(region(fields, after: plan)) }
        assignAddresses(regions, &plan.regions)
        checkOverlaps(regions, plan.regions)
        checkBudget(host, regions, plan, memory: memory, deviceMemory: deviceMemory)
    }

    private func setSwap(_ host: Fields, _ plan: inout Plan) {
        let bytes = host.number("swap") ?? 0
        if bytes % pageSize != 0 || bytes > HostBuilder.memory.upperBound {
            complaints.add(
                host.position(of: "swap"), "a swap device can't have \(Quantity.shown(bytes))",
                "whole pages, at most \(Quantity.shown(HostBuilder.memory.upperBound)); leave it out for none")
        }
        plan.swapPages = Int(clamping: bytes / pageSize)
        plan.swapIsSlow = host.words("swap_speed").first == "slow"
        plan.reclaims = host.flag("reclaim") || bytes > 0
        if host["swap_speed"] != nil, bytes == 0 {
            complaints.add(host.position(of: "swap_speed"), "`swap_speed` without `swap`", "add `swap: 4 MiB`")
        }
    }

    /// In pages; 0: none given.
    private func graphicsLimit(_ key: String, _ host: Fields) -> Int {
        guard let bytes = host.number(key) else { return 0 }
        if bytes == 0 || bytes % pageSize != 0 {
            complaints.add(
                host.position(of: key), "graphics buffers can't have \(Quantity.shown(bytes)) there",
                "whole pages, and not zero; leave it out for no limit")
        }
        return Int(clamping: bytes / pageSize)
    }

    private func checkMemory(_ memory: UInt64, _ deviceMemory: UInt64, _ host: Fields) {
        let range = HostBuilder.memory
        if !range.contains(memory) || memory % pageSize != 0 {
            complaints.add(
                host.position(of: "memory"), "the host can't have \(Quantity.shown(memory)) of memory",
                "whole pages, at least \(Quantity.shown(range.lowerBound)), at most \(Quantity.shown(range.upperBound))"
            )
        }
        if deviceMemory > range.upperBound || deviceMemory % pageSize != 0 {
            complaints.add(
                host.position(of: "device_memory"), "the host can't have \(Quantity.shown(deviceMemory)) there",
                "whole pages, at most \(Quantity.shown(range.upperBound))")
        }
    }

    private func region(_ fields: Fields, after plan: Plan) -> RegionPlan {
        var region = RegionPlan()
        let name = fields.text("name") ?? ""
        region.name = Array(name.utf8)
        if plan.regions.contains(where: { $0.name == region.name }) {
            complaints.add(
                fields.position(of: "name"), "a second region named `\(name)`", "each region has a name of its own")
        }
        region.kind = Vocabulary.kind(fields.words("kind").first)
        region.size = fields.number("size") ?? 0
        region.address = UserAddress(fields.number("address") ?? 0)
        (region.read, region.write) = Vocabulary.rights(fields.words("protection").first)
        region.order = Int(fields.number("order") ?? 0)
        region.hugePages = fields.flag("huge_pages")
        region.slow = fields.words("speed").first == "slow"
        for word in fields.words("userfault") {
            let index = Vocabulary.userFaultModes.firstIndex { $0.word == word } ?? 0
            region.userFaults |= 1 << UInt8(index)
        }
        region.source = source(of: region, fields, plan)
        setPageSize(&region, fields, plan)
        checkSize(region, fields)
        checkKind(region, fields, plan)
        return region
    }

    /// The memfd of a udmabuf: no other kind has a source.
    private func source(of region: RegionPlan, _ fields: Fields, _ plan: Plan) -> Int? {
        let place = fields["source"]?.keyPosition ?? fields.position
        guard let given = fields.regionPlace("source") else {
            if region.kind == .udmabuf {
                complaints.add(place, "a udmabuf without a memfd", "add `source:` and the name of a memfd before it")
            }
            return nil
        }
        guard region.kind == .udmabuf else {
            complaints.add(
                place, "`source` on `\(Vocabulary.word(region.kind))`", "only a `udmabuf` has one; leave it out")
            return nil
        }
        guard let index = plan.regions.firstIndex(where: { $0.name == Array(given.region.utf8) }),
            [.sharedMemory, .privateObject].contains(plan.regions[index].kind)
        else {
            complaints.add(
                place, "`\(given.region)` is no memfd", "the name of a `memfd` that stands before the udmabuf")
            return nil
        }
        if region.size > plan.regions[index].size {
            complaints.add(
                fields.position(of: "size"), "a udmabuf of \(Quantity.shown(region.size))",
                "`\(given.region)` has \(Quantity.shown(plan.regions[index].size))")
        }
        return index
    }

    private func checkSize(_ region: RegionPlan, _ fields: Fields) {
        let size = region.size
        if size == 0 || size % pageSize != 0 {
            complaints.add(
                fields.position(of: "size"), "a region can't have \(Quantity.shown(size))",
                "a size is a multiple of 4 KiB, and not zero")
            return
        }
        let block = pageSize << UInt64(region.order)
        if region.kind == .graphicsBuffer && size % block != 0 {
            complaints.add(
                fields.position(of: "size"),
                "\(Quantity.shown(size)) are not whole blocks of order \(region.order)",
                "a block of order \(region.order) has \(Quantity.shown(block))")
        }
        guard let address = fields.number("address") else { return }
        if address % pageSize != 0 || address == 0 || size > UserAddress.end.value - min(address, UserAddress.end.value)
        {
            complaints.add(
                fields.position(of: "address"), "a region can't be at \(Quantity.hex(address))",
                "an address is a multiple of 4 KiB, not zero, and the region ends below "
                    + Quantity.hex(UserAddress.end.value))
        }
    }

    private func checkKind(_ region: RegionPlan, _ fields: Fields, _ plan: Plan) {
        if fields["order"] != nil && region.kind != .graphicsBuffer {
            complaints.add(
                fields["order"]?.keyPosition ?? fields.position, "`order` on `\(Vocabulary.word(region.kind))`",
                "only a `graphics_buffer` is made of blocks; leave it out")
        }
        if fields["speed"] != nil, ![.sharedMemory, .privateObject, .file, .privateFile].contains(region.kind) {
            complaints.add(
                fields["speed"]?.keyPosition ?? fields.position, "`speed` on `\(Vocabulary.word(region.kind))`",
                "only a `memfd` or a `file` has pages elsewhere; leave it out")
        }
        if region.userFaults != 0 {
            let isShared = region.kind == .sharedMemory
            let isMinor = region.userFaults & 2 != 0
            if ![.anonymous, .sharedMemory, .privateObject].contains(region.kind) || (isMinor && !isShared) {
                complaints.add(
                    fields["userfault"]?.keyPosition ?? fields.position,
                    "`userfault` on `\(Vocabulary.word(region.kind))`",
                    "it is for anonymous memory and memfds, `minor` for `memfd` alone")
            }
        }
        guard region.hugePages else { return }
        let place = fields["huge_pages"]?.keyPosition ?? fields.position
        if region.kind != .anonymous {
            complaints.add(
                place, "`huge_pages` on `\(Vocabulary.word(region.kind))`",
                "only `anonymous` memory takes madvise(MADV_HUGEPAGE) here; leave it out")
        } else if !plan.transparentHugePages {
            complaints.add(
                place, "`huge_pages` on a host without huge pages",
                "add `transparent_huge_pages: true` to `host`, or leave it out")
        }
    }

    /// Regions without an address follow one another, 2 MiB aligned, with 2 MiB between them, past every given one.
    private func assignAddresses(_ fields: [Fields], _ regions: inout [RegionPlan]) {
        let step = PageLevel.page2M.bytes
        var next = HostBuilder.firstAddress
        for (index, region) in regions.enumerated() where fields[index]["address"] == nil {
            guard region.size <= HostBuilder.memory.upperBound else { continue }
            let alignment = max(region.kind.isHuge ? region.pageLevel.bytes : 0, step)
            var address = (next + alignment - 1) / alignment * alignment
            while let other = given(fields, regions, overlapping: address..<address + region.size) {
                address = (other.upperBound + alignment - 1) / alignment * alignment
            }
            regions[index].address = UserAddress(address)
            next = (address + region.size + 2 * step - 1) / step * step
        }
    }

    private func given(
        _ fields: [Fields], _ regions: [RegionPlan], overlapping range: Range<UInt64>
    ) -> Range<UInt64>? {
        for (index, region) in regions.enumerated() where fields[index]["address"] != nil {
            let start = min(region.address.value, UserAddress.end.value)
            let other = start..<start + min(region.size, UserAddress.end.value - start)
            if other.overlaps(range) { return other }
        }
        return nil
    }

    private func checkOverlaps(_ fields: [Fields], _ regions: [RegionPlan]) {
        guard complaints.isEmpty else { return }
        for (index, region) in regions.enumerated() {
            let range = region.address.value..<region.address.value + region.size
            for other in regions[..<index]
            where (other.address.value..<other.address.value + other.size).overlaps(range) {
                complaints.add(
                    fields[index].position(of: "address"),
                    "`\(region.shownName)` overlaps `\(other.shownName)` in the address space",
                    "`\(other.shownName)` takes \(Quantity.hex(other.address.value)) up to "
                        + "\(Quantity.hex(other.address.value + other.size)); leave `address` out to have one assigned")
            }
        }
    }

    /// What the regions need when every page of them is there, in memory or on the swap device.
    private func checkBudget(
        _ host: Fields, _ regions: [Fields], _ plan: Plan, memory: UInt64, deviceMemory: UInt64
    ) {
        guard complaints.isEmpty else { return }
        var left = (ram: memory - plan.setAside + UInt64(plan.swapPages) * pageSize, device: deviceMemory)
        for (index, region) in plan.regions.enumerated() {
            let need = region.frames
            let fitsDevice = need.device <= left.device / pageSize
            guard need.ram <= left.ram / pageSize, fitsDevice else {
                let what = fitsDevice ? "memory" : "device memory"
                complaints.add(
                    regions[index].position(of: "size"), "`\(region.shownName)` doesn't fit the host's \(what)",
                    "\(Quantity.shown(fitsDevice ? left.ram : left.device)) are left for it; raise "
                        + "`host: {\(fitsDevice ? "memory" : "device_memory"): ...}`")
                return
            }
            left.ram -= need.ram * pageSize
            left.device -= need.device * pageSize
        }
    }
}

extension RegionPlan {
    var shownName: String { String(decoding: name, as: UTF8.self) }
    /// Frames that it needs when every page of it is there.
    var frames: (ram: UInt64, device: UInt64) {
        let pages = size / pageSize
        switch kind {
        case .deviceBAR: return (0, pages)
        case .mixedMap: return (pages - pages / 2, pages - pages / 2)
        // Its pages are the memfd's; with holes punched, twice as many at most.
        case .udmabuf: return (pages, 0)
        // Huge pages come out of their pool.
        case .blobWindow, .hugeShared, .hugePrivate: return (0, 0)
        default: return (pages, 0)
        }
    }
}

extension Vocabulary {
    /// The words stand in the order of the cases; a test holds them together.
    static func kind(_ word: String?) -> RegionKind {
        let index = regionKinds.firstIndex { $0.word == word } ?? 0
        return RegionKind.allCases[index]
    }
    static func word(_ kind: RegionKind) -> String { regionKinds[Int(kind.rawValue)].word }
    static func word(_ architecture: Architecture) -> String { architectures[Int(architecture.rawValue)].word }

    static func rights(_ protection: String?) -> (read: Bool, write: Bool) {
        switch protection {
        case "none": (false, false)
        case "read": (true, false)
        default: (true, true)
        }
    }
}
