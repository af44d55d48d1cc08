/// SplitMix64: the same numbers for the same seed, everywhere.
struct RandomSource: RandomNumberGenerator {
    let seed: UInt64
    private var state: UInt64

    init(seed: UInt64) {
        self.seed = seed
        state = seed
    }

    /// A seed of this run's own; tests print it, so that a failure can be had again.
    static func fresh() -> RandomSource { RandomSource(seed: .random(in: 0...UInt64.max)) }

    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var value = state
        value = (value ^ (value >> 30)) &* 0xbf58_476d_1ce4_e5b9
        value = (value ^ (value >> 27)) &* 0x94d0_49bb_1331_11eb
        return value ^ (value >> 31)
    }

    mutating func below(_ bound: Int) -> Int { Int.random(in: 0..<bound, using: &self) }
    mutating func pick<Element>(_ elements: [Element]) -> Element { elements[below(elements.count)] }
    mutating func flip() -> Bool { Bool.random(using: &self) }
    /// Small numbers, numbers near powers of two, any numbers.
    mutating func number() -> UInt64 {
        switch below(3) {
        case 0: UInt64(below(300))
        case 1: (1 << UInt64(below(64))) &- UInt64(below(2))
        default: next()
        }
    }
}
