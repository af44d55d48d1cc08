/// Changes to the process's own memory, most of them to pages that a slot shows.
extension RandomScripts {
    mutating func hostChange() -> Step? {
        guard !regionSizes.isEmpty else { return nil }
        let (region, first) = hostPage()
        let count = 1 + random.next() % min(regionSizes[region] >> 12 - first, 16)
        let place = HostPlace(.region(region), first << 12)
        let length = chance(95) ? count << 12 : [0, 1, 1 << 46, 0 &- 4096][below(4)]
        switch below(20) {
        case ..<4: return .advise(place, length: length, .dontneed)
        case ..<6:
            let advice = pick(Advice.allCases)
            // A kernel fills tables for as long as it is told to.
            return .advise(place, length: advice.fillsTables ? count << 12 : length, advice)
        case ..<8: return .unmap(place, length: length)
        case ..<11: return remap(place, length, region)
        case ..<13:
            return .protect(place, length: length, pick([[], .read, [.read, .write], [.read, .write], .write]))
        case ..<16: return .store(word(place), Repetition(count: count), value: value())
        case ..<18: return .load(word(place), Repetition(count: count))
        case 18: return hole(region, first << 12, count << 12)
        default:
            let target = HostPlace(.region(below(regionSizes.count)), UInt64(below(16)) << 12)
            return .remap(
                place, length: length, newLength: chance(70) ? length : UInt64(below(20)) << 12,
                to: chance(70) ? target : nil)
        }
    }

    /// Most often one that a slot shows.
    private mutating func hostPage() -> (region: Int, page: UInt64) {
        if !slots.isEmpty, chance(90) {
            let slot = pick(slots)
            if case .region(let region) = slot.userAddress.base {
                let page = slot.userAddress.offset >> 12 + random.next() % max(1, slot.size >> 12)
                if page < regionSizes[region] >> 12 { return (region, page) }
            }
        }
        let region = below(regionSizes.count)
        return (region, random.next() % (regionSizes[region] >> 12))
    }

    private mutating func word(_ place: HostPlace) -> HostPlace { HostPlace(place.base, place.offset + word()) }

    private mutating func remap(_ place: HostPlace, _ length: UInt64, _ region: Int) -> Step {
        let source: MapSource =
            switch below(4) {
            case 0: .sharedAnonymous
            case 1 where objects.contains(region): .object(region: region, offset: place.offset)
            default: .anonymous
            }
        return .map(
            place, length: length, chance(85) ? [.read, .write] : [.read], source, replaces: chance(85))
    }

    private mutating func hole(_ region: Int, _ offset: UInt64, _ length: UInt64) -> Step? {
        guard objects.contains(region) else { return nil }
        if chance(70) { return .punchHost(region: region, offset: offset, length: length) }
        return .truncate(region: region, size: chance(50) ? offset : regionSizes[region])
    }
}

extension Advice {
    fileprivate var fillsTables: Bool {
        switch self {
        case .populateRead, .populateWrite, .guardInstall: true
        default: false
        }
    }
}
