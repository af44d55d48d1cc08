import Frames
import Synchrony

/// A process's copies of whole pages: `memcpy` of 4096 bytes. A page is copied at one instant. In Linux each word of it is,
/// at some instant between the copy's start and its end; what a copy can lose shows either way, for a word that was written
/// before its instant is in the copy and one written after is not.
extension AddressSpace {
    /// Reads the page that begins at `address`, a multiple of 4096: 512 words. Errors as `load`.
    public func readPage(_ address: UserAddress) throws(Errno) -> [UInt64] {
        var words: [UInt64] = []
        try reachPage(address, write: false) { first in
            schedulingPoint(.atomicLoad, first.pageIdentity)
            words.reserveCapacity(Int(pageSize / 8))
            for i in 0..<Int(pageSize / 8) { words.append(first.following(i).peek()) }
        }
        return words
    }

    /// Writes a page: 512 words, or none for zeros. Nobody else writes it meanwhile. Errors as `store`.
    public func writePage(_ address: UserAddress, _ words: [UInt64]) throws(Errno) {
        try reachPage(address, write: true) { first in
            schedulingPoint(.atomicUpdate, first.pageIdentity)
            for i in 0..<Int(pageSize / 8) {
                _ = first.following(i).exchangeUnannounced(words.isEmpty ? 0 : words[i])
            }
        }
    }

    /// Calls `body` with the page's first word, once, under the page-table lock: what `access` does for a word.
    private func reachPage(_ address: UserAddress, write: Bool, _ body: (AtomicWord) -> Void) throws(Errno) {
        guard address.offset == 0, address < UserAddress.end else { throw .EFAULT }
        do throws(UserFault) {
            while !tryReachPage(address, write: write, body) { try fault(address, write: write) }
        } catch {
            throw error.errno
        }
    }

    /// False: the entry doesn't allow it.
    private func tryReachPage(_ address: UserAddress, write: Bool, _ body: (AtomicWord) -> Void) -> Bool {
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        guard let leaf = usableLeaf(address, write: write) else { return false }
        let frame = leaf.frame(of: address)
        schedulingNote(.pageUse, frame.physicalAddress)
        body(memory.word(at: frame.physicalAddress))
        return true
    }
}
