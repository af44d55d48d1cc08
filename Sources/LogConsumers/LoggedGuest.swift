// LogConsumers: what VMMs do with KVM's dirty log: pre-copy migration and differential snapshots.
//
// It guarantees: with no mistake switched on, the image that a consumer has made when everything stands still is the
// guest's memory, whoever wrote it: the guest, whose writes are in KVM's log, or the VMM and its devices, whose writes are
// not, and are in the VMM's own (`WriterLog`). It never knows KVM or memory itself: `LoggedGuest` is all that it sees of
// them, so that the same code runs on the model and on a real VM. One task uses a consumer; writers run beside it.
//
// Read `LogReader.swift` next: what a harvest is, in which order.

import Frames

/// A memslot, as its VMM knows it.
public struct GuestSlot: Sendable, Equatable {
    public var id: UInt16
    public var pages: UInt64
    /// `KVM_MEM_LOG_DIRTY_PAGES` is set.
    public var isLogged: Bool
    /// Another number each time that the VMM made a slot of this id, moved it, or changed its flags for another reason than
    /// a consumer's. KVM drops the log with the slot, so what was known of the old one says nothing of the new.
    public var making: UInt64

    public init(id: UInt16, pages: UInt64, isLogged: Bool, making: UInt64) {
        self.id = id
        self.pages = pages
        self.isLogged = isLogged
        self.making = making
    }

    /// Whether `other` is this very slot, logged or not.
    public func isSame(as other: GuestSlot) -> Bool {
        id == other.id && pages == other.pages && making == other.making
    }

    /// Words of a bitmap of the slot. Kernel: `ALIGN(npages, 64) / 64`.
    public var words: Int { Int((pages + 63) / 64) }

    /// A bitmap of every page.
    public var everyPage: [UInt64] {
        var bitmap = [UInt64](repeating: ~0, count: words)
        if pages % 64 != 0 { bitmap[words - 1] = 1 << (pages % 64) - 1 }
        return bitmap
    }
}

/// The bytes of a page: 512 words, or none if all are zero.
public struct PageContent: Sendable, Equatable {
    public static var wordCount: Int { Int(pageSize / 8) }
    public let words: [UInt64]

    /// A page of zeros.
    public init() { words = [] }

    /// Precondition: a page's words.
    public init(_ words: [UInt64]) {
        precondition(words.count == Self.wordCount, "a page has 512 words")
        self.words = words.allSatisfy { $0 == 0 } ? [] : words
    }

    public var isZero: Bool { words.isEmpty }
}

/// What a consumer needs of a VM: KVM's calls on the log, the VMM's own mapping, and the power to make all writers stand
/// still. Only the consumer's task calls it.
open class LoggedGuest {
    public init() {}

    /// The slots of now, by guest address.
    open var slots: [GuestSlot] { [] }
    /// GET only reports; CLEAR takes out of the log, and protects. Kernel: `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
    open var takesByClearing: Bool { false }

    /// Sets or clears `KVM_MEM_LOG_DIRTY_PAGES`. ENOENT: the slot is gone. Kernel: `KVM_SET_USER_MEMORY_REGION`.
    open func setLogging(_ slot: GuestSlot, _ on: Bool) throws(Errno) {}
    /// A bit for each page, `slot.words` of them. ENOENT: the slot is gone, or has no log. Kernel: `KVM_GET_DIRTY_LOG`.
    open func readLog(_ slot: GuestSlot) throws(Errno) -> [UInt64] { [UInt64](repeating: 0, count: slot.words) }
    /// Kernel: `KVM_CLEAR_DIRTY_LOG` of the whole slot with this bitmap.
    open func clearLog(_ slot: GuestSlot, _ bitmap: [UInt64]) throws(Errno) {}

    /// Reads a page through the VMM's mapping. EFAULT and its like: it can't be read.
    open func read(_ page: UInt64, of slot: GuestSlot) throws(Errno) -> PageContent { PageContent() }
    /// Writes one, with everything standing still.
    open func write(_ content: PageContent, _ page: UInt64, of slot: GuestSlot) throws(Errno) {}
    /// Whether the page is in memory. Kernel: `mincore`.
    open func isResident(_ page: UInt64, of slot: GuestSlot) -> Bool { true }

    /// Returns when every vCPU is out of KVM_RUN and no device or other part of the VMM writes guest memory or changes
    /// slots, and none will before `resume`.
    open func pause() {}
    open func resume() {}
    /// Everything stands still, and `image` is complete: what the destination, or the restored VM, would begin with. For
    /// checks.
    open func stopped(with image: MemoryImage) {}
}
