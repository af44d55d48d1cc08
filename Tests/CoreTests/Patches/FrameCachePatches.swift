import Audit
import Frames
import Machine
import Synchrony
import Testing

@testable import GuestMemory
@testable import HostMemory

@Suite struct Patch29_CachesReleaseWhatTheyGot {
    /// How the refreshes of `guest`'s caches released their pages.
    private func releases(_ guest: TestGuest) -> [ReleaseKind] {
        guest.test.events(.released).filter { $0.holder == .frameCache }.compactMap {
            ReleaseKind(rawValue: UInt8(truncatingIfNeeded: $0.value))
        }
    }

    @Test func `a pass that an invalidation refuses releases its page unused, the one that counts releases it clean`()
        throws
    {
        try checkPatch(29) {
            var refused = 0
            for point in 0..<20 {
                let guest = TestGuest()
                try guest.addMemory(0, 1)
                try guest.space.store(at(0), 1)
                let cache = FrameCache(guest.vm)
                let invalidation = SteppedInvalidation(guest.space, 0..<1)
                // Nothing changes in it: another notifier had refused.
                let interposer = SteppingInterposer([
                    (
                        point,
                        {
                            invalidation.start()
                            invalidation.end()
                        }
                    )
                ])
                try interposer.run { try cache.activate(gfn(0).address, length: 8) }
                let passes = releases(guest)
                #expect(passes == [.clean] || passes == [.unused, .clean], "point \(point)")
                refused += passes.count - 1
                #expect(guest.heldReferences == 0 && cache.isUsable)
                cache.deactivate()
            }
            #expect(refused > 0)
        }
    }

    @Test func `a refresh that fails in its second pass has marked nothing`() throws {
        try checkPatch(29) {
            var refused = 0
            for point in 0..<20 {
                let guest = TestGuest()
                let object = MemoryObject(host: guest.test.host, pages: 1)
                try guest.space.mapPages(0, 1, .object(object))
                try guest.setSlot(pages: 1)
                try guest.space.store(at(0), 1)
                let frame = try #require(guest.frame(0))
                let cache = FrameCache(guest.vm)
                let space = guest.space
                let interposer = Interposer(point) { #expect(throws: Never.self) { try space.unmap(pages(0..<1)) } }
                interposer.ignoring(.frameCacheRefresh)
                let failed = interposer.run {
                    do throws(Errno) {
                        try cache.activate(gfn(0).address, length: 8)
                        return false
                    } catch { return true }
                }
                if failed {
                    refused += releases(guest).count
                    #expect(!guest.test.state(frame).flags.isAccessed(by: .kvm))
                }
                #expect(guest.heldReferences == 0)
                cache.deactivate()
            }
            #expect(refused > 0)
        }
    }
}
