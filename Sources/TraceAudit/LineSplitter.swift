import Glibc

/// Cuts bytes that come in any portions into lines.
///
/// A line is handed over without its line feed and the carriage returns before it, as a view into the portion that was
/// fed, valid inside the call only. A line that is longer than ``limit`` is not kept: ``Line/overlong`` stands for it,
/// so that lines can still be counted.
public struct LineSplitter {
    public enum Line {
        case bytes(UnsafeBufferPointer<UInt8>)
        case overlong
    }

    /// Bytes. ftrace's own limit for a line is one page.
    public static var limit: Int { TraceAuditLimits.lineBytes }

    /// The beginning of a line whose end has not come yet.
    private var carry: [UInt8] = []
    /// Inside a line that is longer than the limit.
    private var skipping = false

    public init() {}

    /// Takes the next bytes and hands over each line that they end.
    public mutating func feed(_ bytes: UnsafeRawBufferPointer, _ body: (Line) -> Void) {
        guard var position = bytes.bindMemory(to: UInt8.self).baseAddress else { return }
        let end = position + bytes.count
        while position != end {
            guard let newline = memchr(position, 0x0a, end - position) else { break }
            let stop = UnsafePointer(newline.assumingMemoryBound(to: UInt8.self))
            endLine(UnsafeBufferPointer(start: position, count: stop - position), body)
            position = stop + 1
        }
        keep(UnsafeBufferPointer(start: position, count: end - position), body)
    }

    /// Hands over a last line that has no line feed.
    public mutating func finish(_ body: (Line) -> Void) {
        if !carry.isEmpty { giveCarry(body) }
        skipping = false
    }

    private mutating func endLine(_ part: UnsafeBufferPointer<UInt8>, _ body: (Line) -> Void) {
        if skipping {
            skipping = false
        } else if carry.isEmpty {
            body(.bytes(Self.withoutReturns(part)))
        } else if carry.count + part.count <= Self.limit {
            carry.append(contentsOf: part)
            giveCarry(body)
        } else {
            carry = []
            body(.overlong)
        }
    }

    private mutating func keep(_ part: UnsafeBufferPointer<UInt8>, _ body: (Line) -> Void) {
        guard !part.isEmpty, !skipping else { return }
        if carry.count + part.count > Self.limit {
            carry = []
            skipping = true
            return body(.overlong)
        }
        carry.append(contentsOf: part)
    }

    private mutating func giveCarry(_ body: (Line) -> Void) {
        carry.withUnsafeBufferPointer { body(.bytes(Self.withoutReturns($0))) }
        carry.removeAll(keepingCapacity: true)
    }

    private static func withoutReturns(_ line: UnsafeBufferPointer<UInt8>) -> UnsafeBufferPointer<UInt8> {
        var count = line.count
        while count > 0, line[count - 1] == 0x0d { count -= 1 }
        return UnsafeBufferPointer(rebasing: line[..<count])
    }
}
