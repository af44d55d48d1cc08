/// A trace in Perfetto's format, written as it goes: tracks of processes, their threads and counters, with slices,
/// instants and values on them. Opens in ui.perfetto.dev, and in `trace_processor`.
///
/// A file is a sequence of packets, each a field of the message `Trace`, so it can be written piece by piece. All packets
/// are of one sequence. Times on one track never go back: an event that is older than the one before on its track, as two
/// processors' clocks can make it, gets that one's time. Slices of a track nest: an end belongs to the last begin.
struct PerfettoTrace {
    struct Track: Equatable, Sendable {
        fileprivate let uuid: UInt64
    }

    /// A fact that is shown with a slice or an instant.
    enum Value {
        case count(UInt64)
        /// Shown in hexadecimal.
        case address(UInt64)
        case text(String)
    }

    private let sink: ([UInt8]) -> Void
    private var pending: [UInt8] = []
    private var packets = 0
    private var tracks: UInt64 = 0
    /// Time of the last event, by the track's number.
    private var latest: [UInt64] = [0]

    /// `sink` takes the bytes, some ten thousand at a time; the last ones with ``finish()``.
    init(sink: @escaping ([UInt8]) -> Void) { self.sink = sink }

    // MARK: tracks

    mutating func process(_ pid: UInt32, name: String) -> Track {
        var process = ProtobufMessage()
        process.add(PerfettoSchema.ProcessDescriptor.pid, UInt64(pid))
        process.add(PerfettoSchema.ProcessDescriptor.name, name)
        return track { $0.add(PerfettoSchema.TrackDescriptor.process, process) }
    }

    mutating func thread(_ tid: UInt32, of pid: UInt32, name: String) -> Track {
        var thread = ProtobufMessage()
        thread.add(PerfettoSchema.ThreadDescriptor.pid, UInt64(pid))
        thread.add(PerfettoSchema.ThreadDescriptor.tid, UInt64(tid))
        thread.add(PerfettoSchema.ThreadDescriptor.name, name)
        return track { $0.add(PerfettoSchema.TrackDescriptor.thread, thread) }
    }

    /// A track without a thread of its own.
    mutating func lane(_ name: String, of parent: Track) -> Track {
        track { descriptor in
            descriptor.add(PerfettoSchema.TrackDescriptor.name, name)
            descriptor.add(PerfettoSchema.TrackDescriptor.parent, parent.uuid)
        }
    }

    mutating func counter(_ name: String, unit: String, of parent: Track) -> Track {
        var counter = ProtobufMessage()
        counter.add(PerfettoSchema.CounterDescriptor.unitName, unit)
        return track { descriptor in
            descriptor.add(PerfettoSchema.TrackDescriptor.name, name)
            descriptor.add(PerfettoSchema.TrackDescriptor.parent, parent.uuid)
            descriptor.add(PerfettoSchema.TrackDescriptor.counter, counter)
        }
    }

    private mutating func track(_ describe: (inout ProtobufMessage) -> Void) -> Track {
        tracks += 1
        latest.append(0)
        var descriptor = ProtobufMessage()
        descriptor.add(PerfettoSchema.TrackDescriptor.uuid, tracks)
        describe(&descriptor)
        var packet = ProtobufMessage()
        packet.add(PerfettoSchema.TracePacket.trackDescriptor, descriptor)
        write(&packet)
        return Track(uuid: tracks)
    }

    // MARK: events

    mutating func begin(
        _ name: String, _ category: StaticString, on track: Track, at time: UInt64,
        _ facts: KeyValuePairs<StaticString, Value> = [:]
    ) {
        named(.begin, name, category, on: track, at: time, facts)
    }

    mutating func end(on track: Track, at time: UInt64) { event(.end, on: track, at: time) { _ in } }

    mutating func instant(
        _ name: String, _ category: StaticString, on track: Track, at time: UInt64,
        _ facts: KeyValuePairs<StaticString, Value> = [:]
    ) {
        named(.instant, name, category, on: track, at: time, facts)
    }

    mutating func set(_ counter: Track, to value: Int, at time: UInt64) {
        event(.counter, on: counter, at: time) { $0.add(PerfettoSchema.TrackEvent.counterValue, value) }
    }

    private mutating func named(
        _ type: PerfettoSchema.EventType, _ name: String, _ category: StaticString, on track: Track, at time: UInt64,
        _ facts: KeyValuePairs<StaticString, Value>
    ) {
        event(type, on: track, at: time) { message in
            message.add(PerfettoSchema.TrackEvent.category, "\(category)")
            message.add(PerfettoSchema.TrackEvent.name, name)
            for (key, value) in facts {
                message.add(PerfettoSchema.TrackEvent.annotation, Self.annotation(key, value))
            }
        }
    }

    private static func annotation(_ key: StaticString, _ value: Value) -> ProtobufMessage {
        var annotation = ProtobufMessage()
        annotation.add(PerfettoSchema.DebugAnnotation.name, "\(key)")
        switch value {
        case .count(let number): annotation.add(PerfettoSchema.DebugAnnotation.unsigned, number)
        case .address(let number): annotation.add(PerfettoSchema.DebugAnnotation.pointer, number)
        case .text(let text): annotation.add(PerfettoSchema.DebugAnnotation.text, text)
        }
        return annotation
    }

    private mutating func event(
        _ type: PerfettoSchema.EventType, on track: Track, at time: UInt64, _ fill: (inout ProtobufMessage) -> Void
    ) {
        let time = max(time, latest[Int(track.uuid)])
        latest[Int(track.uuid)] = time
        var event = ProtobufMessage()
        event.add(PerfettoSchema.TrackEvent.type, type.rawValue)
        event.add(PerfettoSchema.TrackEvent.track, track.uuid)
        fill(&event)
        var packet = ProtobufMessage()
        packet.add(PerfettoSchema.TracePacket.timestamp, time)
        packet.add(PerfettoSchema.TracePacket.trackEvent, event)
        write(&packet)
    }

    // MARK: packets

    private mutating func write(_ packet: inout ProtobufMessage) {
        packet.add(PerfettoSchema.TracePacket.sequence, 1)
        if packets == 0 { packet.add(PerfettoSchema.TracePacket.sequenceFlags, PerfettoSchema.sequenceBegins) }
        packets += 1
        var trace = ProtobufMessage()
        trace.add(PerfettoSchema.Trace.packet, packet)
        pending += trace.bytes
        if pending.count >= 1 << 16 { finish() }
    }

    /// Hands over what is left.
    mutating func finish() {
        if !pending.isEmpty { sink(pending) }
        pending.removeAll(keepingCapacity: true)
    }
}
