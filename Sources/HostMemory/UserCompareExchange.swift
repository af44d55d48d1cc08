import Frames
import Synchrony

extension AddressSpace {
    /// Stores `desired` if `expected` is there, 8 bytes or 4, `address` a multiple of that; whether it was. The page is
    /// faulted in as for any store. EFAULT: the process may not write there. Kernel: `__try_cmpxchg_user`.
    public func compareExchange(
        _ address: UserAddress, wide: Bool, expected: UInt64, desired: UInt64
    ) throws(Errno) -> Bool {
        guard address.value & (wide ? 7 : 3) == 0, address < UserAddress.end else { throw .EFAULT }
        mightSleep()
        while true {
            let done: Bool? = withFrame(of: address, write: true) { frame in
                let place = frame.physicalAddress | address.offset
                let word = memory.word(at: place & ~7)
                guard !wide else { return word.compareExchange(expected: expected, desired: desired) == nil }
                return Self.exchangeHalf(word, high: place & 4 != 0, UInt32(truncatingIfNeeded: expected), desired)
            }
            if let done { return done }
            do throws(UserFault) { try fault(address, write: true) } catch { throw .EFAULT }
        }
    }

    private static func exchangeHalf(_ word: AtomicWord, high: Bool, _ expected: UInt32, _ desired: UInt64) -> Bool {
        let shift: UInt64 = high ? 32 : 0
        var seen = word.loadRacing()
        while UInt32(truncatingIfNeeded: seen >> shift) == expected {
            let new = seen & ~(0xffff_ffff << shift) | (desired & 0xffff_ffff) << shift
            guard let found = word.compareExchange(expected: seen, desired: new) else { return true }
            seen = found
        }
        return false
    }
}
