// TraceAudit
