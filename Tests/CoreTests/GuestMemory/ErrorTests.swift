import Audit
import Frames
import Machine
import Testing

@testable import GuestMemory
@testable import HostMemory

/// I-15, I-18, I-19: every kind of memory against every way to ask.
@Suite struct I19_ErrorsHaveTheirCause {
    /// One page of each kind, in the order of the pages.
    private func addEveryKind(_ guest: TestGuest) throws -> Int {
        let host = guest.test.host
        let backings: [Backing] = [
            .anonymous, .anonymous, .anonymousShared, .object(MemoryObject(host: host, pages: 1)),
            .object(MemoryObject(host: host, pages: 1), shared: false),
            .object(MemoryObject(host: host, pages: 1, slow: true)), .object(MemoryObject(host: host, pages: 0)),
            .driver(try #require(DeviceBAR(host, pages: 1, filling: .byFault))),
            .driver(try #require(CountedPagesByFrame(host, pages: 1))),
            .driver(try #require(GraphicsBuffer(host, pages: 2, order: 1)), firstPage: 1),
            .driver(try #require(MixedBuffer(host, pages: 2))),
            .driver(try #require(MixedBuffer(host, pages: 2)), firstPage: 1),
            .driver(try #require(EventRing(host, dataPages: 1)), firstPage: 1),
        ]
        var page = 0
        for protection in [Protection.readWrite, .read, .none] {
            for backing in backings {
                try guest.space.mapPages(page, 1, backing, protection)
                page += 1
            }
        }
        try guest.space.store(at(1), 1)
        guest.test.host.poison(try #require(guest.frame(1)))
        // One page beyond the last has no VMA, and one beyond that no slot.
        try guest.setSlot(pages: page + 1)
        return page + 2
    }

    @Test(arguments: [false, true], [false, true])
    func `needs-IO only with no-wait, a signal only if one is pending, and errors own nothing`(
        write: Bool, noWait: Bool
    ) throws {
        var errors: Set<TranslationError> = []
        for interruptible in [false, true] {
            for signal in 0..<3 {
                let guest = TestGuest()
                let count = try addEveryKind(guest)
                for page in 0..<count {
                    if signal == 1 { guest.space.signals.pending = true }
                    if signal == 2 { guest.space.signals.fatal = true }
                    let answer = guest.faultIn(page, write: write, noWait: noWait, interruptible: interruptible)
                    guest.space.signals.pending = false
                    guest.space.signals.fatal = false
                    if let error = answer.error {
                        errors.insert(error)
                        #expect(answer == .failed(error), "no frame, not writable, nothing owned")
                    } else {
                        #expect(answer.frame != nil)
                        #expect(!write || answer.writable)
                    }
                    if answer.error == .needsIO { #expect(noWait, "page \(page)") }
                    if answer.error == .signalPending {
                        #expect(signal == 2 || (signal == 1 && interruptible && !noWait), "page \(page)")
                    }
                    if answer.error == .readOnly { #expect(write, "page \(page)") }
                }
                #expect(guest.test.journal.holdings.isEmpty)
            }
        }
        #expect(errors.isSuperset(of: [.fault, .hardwarePoison, .signalPending, .noSlot]))
        #expect(errors.contains(.needsIO) == noWait)
    }
}
