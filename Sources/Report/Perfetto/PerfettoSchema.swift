/// The numbers of the fields that are written, by message, as Perfetto's published trace schema has them. They are part
/// of a file format and never change there. Written down from memory, then compared with the schema in Perfetto's Python
/// package 0.59.1.
enum PerfettoSchema {
    enum Trace {
        static let packet = 1
    }
    enum TracePacket {
        /// Nanoseconds.
        static let timestamp = 8
        static let sequence = 10
        static let trackEvent = 11
        static let sequenceFlags = 13
        static let trackDescriptor = 60
    }
    /// `SEQ_INCREMENTAL_STATE_CLEARED`: the sequence begins here, nothing before it is missed.
    static let sequenceBegins: UInt64 = 1

    enum TrackDescriptor {
        static let uuid = 1
        static let name = 2
        static let process = 3
        static let thread = 4
        static let parent = 5
        static let counter = 8
    }
    enum ProcessDescriptor {
        static let pid = 1
        static let name = 6
    }
    enum ThreadDescriptor {
        static let pid = 1
        static let tid = 2
        static let name = 5
    }
    enum CounterDescriptor {
        static let unitName = 6
    }
    enum TrackEvent {
        static let annotation = 4
        static let type = 9
        static let track = 11
        static let category = 22
        static let name = 23
        static let counterValue = 30
    }
    /// `TrackEvent.Type`.
    enum EventType: UInt64 {
        case begin = 1
        case end = 2
        case instant = 3
        case counter = 4
    }
    enum DebugAnnotation {
        static let unsigned = 3
        static let text = 6
        static let pointer = 7
        static let name = 10
    }
}
