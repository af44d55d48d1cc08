import Frames

// The bytes of a guest's actions on its own page tables.

extension PlanWriter {
    mutating func tableAction(_ action: Action) {
        switch action {
        case .mapPage(let address, let target, let level, let rights):
            place(.mapPage, address, level)
            number(target.value)
            bytes.append(rights.rawValue)
        case .unmapPage(let address, let level): place(.unmapPage, address, level)
        case .restorePage(let address, let level): place(.restorePage, address, level)
        case .protectPage(let address, let level, let rights):
            place(.protectPage, address, level)
            bytes.append(rights.rawValue)
        case .flushPage(let address):
            code(.flushPage)
            number(address.value)
        case .loadCR3: code(.loadCR3)
        default: preconditionFailure("not an action on the guest's tables")
        }
    }

    private mutating func place(_ code: ActionCode, _ address: GuestAddress, _ level: UInt8) {
        self.code(code)
        number(address.value)
        bytes.append(level)
    }
}

extension PlanReader {
    mutating func tableAction(_ code: ActionCode) throws(PlanDecodingError) -> Action {
        if code == .loadCR3 { return .loadCR3 }
        let address = GuestAddress(try number())
        if code == .flushPage { return .flushPage(at: address) }
        let level = try byte()
        guard (1...4).contains(level) else { throw bad(.badValue) }
        switch code {
        case .mapPage:
            let target = GuestAddress(try number())
            guard level <= 2 else { throw bad(.badValue) }
            return .mapPage(at: address, to: target, level: level, try enumeration())
        case .unmapPage: return .unmapPage(at: address, level: level)
        case .restorePage: return .restorePage(at: address, level: level)
        case .protectPage: return .protectPage(at: address, level: level, try enumeration())
        default: throw bad(.badValue)
        }
    }
}
