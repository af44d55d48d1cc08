import JSONOutput

extension AuditReport {
    /// The report as JSON, keys sorted, the same bytes in every run, with a line break at the end.
    public func jsonString() -> String { jsonText(self) }
}
