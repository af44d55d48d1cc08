/// A zap that began and of which the recording does not show the end.
///
/// `kvm_unmap_hva_range` is written before `mmu_lock` is taken: other CPUs may still fault and install, legally, until
/// the zap really happens, and the guest may write through its TLB until the flush. All of that is over once the same
/// thread writes an event of another kind: the notifier call has returned. Spec: x86 10, X11, X12, F1.
struct ZapWindow {
    enum Cause { case notifier, fastZap, slotChange }
    var cause: Cause
    var thread: UInt32
    /// Guest frames that the zap covers.
    var frames: [ClosedRange<UInt64>]
    var openLine: UInt64
    var closeLine: UInt64?
    var closeTime: UInt64 = 0

    func covers(_ frame: UInt64, level: Int) -> Bool {
        let last = frame | (pages(level: level) - 1)
        return frames.contains { $0.lowerBound <= last && $0.upperBound >= frame }
    }
}

extension MachineAudit {
    private static let remembered = 16

    /// Begins a zap of `frames` by `thread`: present entries there count as lost at a time still to come.
    func openWindow(_ cause: ZapWindow.Cause, thread: UInt32, frames: [ClosedRange<UInt64>], at moment: Moment) {
        closeWindows(of: thread, at: moment)
        guard !frames.isEmpty, openWindows.count < 1024 else { return }
        openWindows.append(
            ZapWindow(cause: cause, thread: thread, frames: frames, openLine: moment.line, closeLine: nil))
        for range in frames {
            history.forEach(in: range) { known in
                // An unknown entry may be a huge one that was split: one page of it says nothing about the others.
                guard known.state == .present else { return }
                known.state = .lost
                known.lostAt = KnownEntry.open
            }
        }
    }

    /// Ends the notifier calls and fast zaps of `thread`: it has gone on to something else.
    func closeWindows(of thread: UInt32, at moment: Moment) {
        guard !openWindows.isEmpty else { return }
        close(at: moment) { $0.thread == thread && $0.cause != .slotChange }
    }

    /// Ends a slot change. After one that failed nothing is certain.
    func closeSlotChange(of thread: UInt32, at moment: Moment, succeeded: Bool) {
        guard succeeded else {
            openWindows.removeAll { $0.thread == thread && $0.cause == .slotChange }
            return
        }
        close(at: moment) { $0.thread == thread && $0.cause == .slotChange }
    }

    private func close(at moment: Moment, _ ends: (ZapWindow) -> Bool) {
        for index in openWindows.indices.reversed() where ends(openWindows[index]) {
            var window = openWindows.remove(at: index)
            window.closeLine = moment.line
            window.closeTime = moment.time
            let opened = Self.short(window.openLine)
            let closed = Self.short(moment.line)
            for range in window.frames {
                history.forEach(in: range) { known in
                    if known.state == .lost, known.lostAt == KnownEntry.open, known.setAt < opened {
                        known.lostAt = closed
                    } else if known.state == .present, known.setAt > opened {
                        known.state = .unknown
                    }
                }
            }
            guard window.cause == .notifier else { continue }
            if closedWindows.count == Self.remembered { closedWindows.removeFirst() }
            closedWindows.append(window)
        }
    }

    /// The clocks of two CPUs may differ by this much: nanoseconds.
    private static let clockSkew: UInt64 = 1_000_000

    /// The finished notifier call that the thread's last lookup should have noticed. One of the same thread counts at
    /// once; one of another only when it was over so long ago that the CPUs' clocks cannot have swapped the order.
    func overtakingWindow(frame: UInt64, level: Int, thread: TracedThread, now: UInt64) -> ZapWindow? {
        closedWindows.last {
            $0.openLine > thread.requestLine && $0.covers(frame, level: level)
                && ($0.thread == thread.id || now > $0.closeTime + Self.clockSkew)
        }
    }

    /// Line numbers as the entry history keeps them.
    static func short(_ line: UInt64) -> UInt32 { UInt32(min(line, UInt64(UInt32.max - 1))) }
}
