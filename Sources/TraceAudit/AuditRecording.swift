/// Audits the recording at `path`, in any form that ``RecordingSource`` reads.
///
/// The file is streamed; memory does not grow with its size. `progress` is called with the bytes of text read so far,
/// about once for every 16 MiB.
public func auditRecording(
    path: String, progress: (UInt64) -> Void = { _ in }
) async throws(AuditInputError) -> AuditReport {
    try await auditRecording(RecordingSource(path: path), progress: progress)
}

/// The same for a source, with a follower that hears of each event as it is read.
package func auditRecording(
    _ source: RecordingSource, follower: (any RecordingFollower)? = nil, progress: (UInt64) -> Void = { _ in }
) async throws(AuditInputError) -> AuditReport {
    let auditor = TraceAuditor(follower: follower)
    var meter = ProgressMeter()
    let origin = try await source.forEachPart { part in
        auditor.feed(part)
        meter.add(part.count, progress)
    }
    for complaint in origin.complaints { auditor.note("trace-cmd: \(complaint)") }
    return auditor.finish(file: source.path)
}

/// The same for a file that is text as it is, such as one of tracefs.
package func auditText(
    path: String, follower: any RecordingFollower
) throws(AuditInputError) -> AuditReport {
    let auditor = TraceAuditor(follower: follower)
    var file = try RecordingFile(path: path)
    defer { file.close() }
    try file.forEachPart { part throws(AuditInputError) in auditor.feed(part) }
    return auditor.finish(file: path)
}

private struct ProgressMeter {
    private var total: UInt64 = 0
    private var next: UInt64 = 1 << 24

    mutating func add(_ count: Int, _ progress: (UInt64) -> Void) {
        total += UInt64(count)
        if total >= next {
            progress(total)
            next = total + 1 << 24
        }
    }
}
