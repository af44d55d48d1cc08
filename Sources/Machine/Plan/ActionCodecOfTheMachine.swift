import Frames

// The bytes of actions on dirty rings, private memory, frame caches and asynchronous faults.

extension PlanWriter {
    mutating func machineAction(_ action: Action) {
        switch action {
        case .collectRing(let cpu):
            code(.collectRing)
            count(cpu)
        case .resetRings: code(.resetRings)
        case .setAttributes(let address, let size, let isPrivate):
            stretch(.setAttributes, address, size)
            flag(isPrivate)
        case .punchPrivate(let address, let size): stretch(.punchPrivate, address, size)
        case .cacheStore(let address, let value): stretch(.cacheStore, address, value)
        case .cacheLoad(let address):
            code(.cacheLoad)
            number(address.value)
        case .preFault(let address, let size): stretch(.preFault, address, size)
        case .fetchPage: code(.fetchPage)
        default: preconditionFailure("not an action on the machine")
        }
    }

    private mutating func stretch(_ code: ActionCode, _ address: GuestAddress, _ second: UInt64) {
        self.code(code)
        number(address.value)
        number(second)
    }
}

extension PlanReader {
    mutating func machineAction(_ code: ActionCode) throws(PlanDecodingError) -> Action {
        switch code {
        case .collectRing:
            let cpu = try count()
            guard cpu < virtualCPUs else { throw bad(.badReference) }
            return .collectRing(cpu: cpu)
        case .resetRings: return .resetRings
        case .fetchPage: return .fetchPage
        default: break
        }
        let address = GuestAddress(try number())
        switch code {
        case .setAttributes: return .setAttributes(at: address, size: try number(), isPrivate: try flag())
        case .punchPrivate: return .punchPrivate(at: address, size: try number())
        case .cacheStore: return .cacheStore(at: address, value: try number())
        case .cacheLoad: return .cacheLoad(at: address)
        case .preFault: return .preFault(at: address, size: try number())
        default: throw bad(.badValue)
        }
    }
}
