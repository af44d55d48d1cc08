import Audit
import Frames

extension LegacyPageLookup {
    /// Forgets the ownership of a reference that GUP gave: the count stays raised, and only whoever guesses right from
    /// the frame number will ever put it. That is what KVM did up to 6.12. Spec: generic 10.1 ("not reported").
    public func adopt(_ reference: consuming PageReference) { reference.surrender() }

    /// The other way: owns a reference that the heuristic took before. Nil if it says now that the frame has none.
    public func claim(_ frame: HostFrame, holder: Holder) -> PageReference? {
        guard refcountedPage(of: frame) != nil else { return nil }
        let memory = memory.takeUnretainedValue()
        memory.record(Event(.referenceDropped, holder: .heuristic, frame: frame))
        return PageReference(adopting: memory.page(frame), of: memory, holder: holder)
    }
}

extension PageReference {
    /// Gives up ownership without putting the page; the ledger moves it to the heuristic. A value of 1 tells it that
    /// GUP gave the reference.
    consuming func surrender() {
        let memory = memory
        let page = page
        let holder = holder
        discard self
        memory._withUnsafeGuaranteedRef { memory in
            let frame = memory.frame(of: page)
            memory.record(Event(.referenceDropped, holder: holder, frame: frame))
            memory.record(Event(.referenceTaken, holder: .heuristic, frame: frame, value: 1))
        }
    }
}
