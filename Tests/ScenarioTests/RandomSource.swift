import SeededRandom

/// Random values of a test, with the seed that makes them again.
struct RandomSource: RandomNumberGenerator {
    let seed: UInt64
    private var numbers: SplitMix

    init(seed: UInt64) {
        self.seed = seed
        numbers = SplitMix(seed: seed)
    }

    /// A seed of this run's own; tests print it, so that a failure can be had again.
    static func fresh() -> RandomSource { RandomSource(seed: .random(in: 0...UInt64.max)) }

    mutating func next() -> UInt64 { numbers.next() }

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
