/// Changes to the process's own memory, most of them to pages that a slot shows.
extension RandomScripts {
    mutating func hostChange() -> Step? {
        guard !regionSizes.isEmpty else { return nil }
        let region = hostRegion()
        let pages = regionSizes[region] >> 12
        let first = random.next() % pages
        let count = 1 + random.next() % min(pages - first, 16)
        let place = HostPlace(.region(region), first << 12)
        let length = chance(95) ? count << 12 : [0, 1, 1 << 46, 0 &- 4096][below(4)]
        switch below(20) {
        case ..<4: return .advise(place, length: length, .dontneed)
        case ..<6: return .advise(place, length: length, pick(Advice.allCases))
        case ..<8: return .unmap(place, length: length)
        case ..<11: return remap(place, length, region)
        case ..<13:
            return .protect(place, length: length, pick([[], .read, [.read, .write], [.read, .write], .write]))
        case ..<16: return .store(word(place), Repetition(count: count), value: random.next() >> UInt64(below(60)))
        case ..<18: return .load(word(place), Repetition(count: count))
        case 18: return hole(region, first << 12, count << 12)
        default:
            let target = HostPlace(.region(below(regionSizes.count)), UInt64(below(16)) << 12)
            return .remap(
                place, length: length, newLength: chance(70) ? length : UInt64(below(20)) << 12,
                to: chance(70) ? target : nil)
        }
    }

    private mutating func hostRegion() -> Int {
        guard !slots.isEmpty, chance(85), case .region(let region) = pick(slots).userAddress.base else {
            return below(regionSizes.count)
        }
        return region
    }

    private mutating func word(_ place: HostPlace) -> HostPlace {
        HostPlace(place.base, place.offset + UInt64(below(512)) * 8)
    }

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
