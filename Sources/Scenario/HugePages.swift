import Frames
import Machine
import TextInput

/// Huge pages that the host sets aside, and the regions made of them.
extension HostBuilder {
    func setHugePages(_ host: Fields, _ plan: inout Plan, memory: UInt64) {
        plan.hugePages2M = Int(host.number("hugetlb_2m") ?? 0)
        plan.hugePages1G = Int(host.number("hugetlb_1g") ?? 0)
        // The first 2 MiB are in use before the pools are made, and 1 GiB pages come from the upper end of memory.
        let gigantic = plan.hugePages1G == 0 ? 0 : memory % PageLevel.page1G.bytes
        let usable = memory - gigantic
        guard plan.setAside > 0, plan.setAside + PageLevel.page2M.bytes > usable else { return }
        complaints.add(
            host.position(of: plan.hugePages1G > 0 ? "hugetlb_1g" : "hugetlb_2m"),
            "the host can't set \(Quantity.shown(plan.setAside)) aside for huge pages",
            "it has \(Quantity.shown(memory)), naturally aligned pages are wanted, and the rest needs room too; raise "
                + "`memory`")
    }

    func setPageSize(_ region: inout RegionPlan, _ fields: Fields, _ plan: Plan) {
        let place = fields["page_size"]?.keyPosition ?? fields.position
        guard region.kind.isHuge else {
            if fields["page_size"] != nil {
                complaints.add(
                    place, "`page_size` on `\(Vocabulary.word(region.kind))`",
                    "only `hugetlb` memory has one; leave it out")
            }
            return
        }
        let bytes = fields.number("page_size") ?? PageLevel.page2M.bytes
        guard let level = Vocabulary.hugeLevel(bytes) else {
            complaints.add(
                fields.position(of: "page_size"), "there are no huge pages of \(Quantity.shown(bytes))",
                "2 MiB or 1 GiB")
            return
        }
        region.pageLevel = level
        if region.size % level.bytes != 0 || region.address.value % level.bytes != 0 {
            complaints.add(
                fields.position(of: region.size % level.bytes != 0 ? "size" : "address"),
                "`\(region.shownName)` is not made of whole huge pages",
                "size and address are multiples of \(Quantity.shown(level.bytes))")
        }
        checkPool(region, fields, plan)
    }

    /// A mapping reserves all that it may need when it is made: else mmap fails with ENOMEM.
    private func checkPool(_ region: RegionPlan, _ fields: Fields, _ plan: Plan) {
        let (key, pages) =
            region.pageLevel == .page1G ? ("hugetlb_1g", plan.hugePages1G) : ("hugetlb_2m", plan.hugePages2M)
        let earlier = plan.regions.filter { $0.kind.isHuge && $0.pageLevel == region.pageLevel }
        let left = UInt64(pages) - min(UInt64(pages), earlier.reduce(0) { $0 + $1.size / $1.pageLevel.bytes })
        guard region.size / region.pageLevel.bytes > left else { return }
        complaints.add(
            fields.position(of: "size"), "`\(region.shownName)` doesn't fit the host's huge pages",
            "\(left) are left for it; raise `host: {\(key): ...}`")
    }
}

extension Plan {
    /// Bytes of memory in pools of huge pages.
    var setAside: UInt64 {
        UInt64(hugePages2M) * PageLevel.page2M.bytes + UInt64(hugePages1G) * PageLevel.page1G.bytes
    }
}

extension RegionKind {
    var isHuge: Bool { self == .hugeShared || self == .hugePrivate }
}

extension Vocabulary {
    static func hugeLevel(_ bytes: UInt64) -> PageLevel? {
        [PageLevel.page2M, .page1G].first { $0.bytes == bytes }
    }
}
