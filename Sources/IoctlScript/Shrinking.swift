import TextInput

extension Script {
    /// The same script with as few lines as possible of which `fails` still says so: blocks are left out, halves first,
    /// with whatever names what they have made.
    public func shrunk(_ fails: (Script) -> Bool) -> Script {
        var best = self
        var block = max(1, lines.count / 2)
        while true {
            var start = 0
            var hasShrunk = false
            while start < best.lines.count {
                var lines = best.lines
                lines.removeSubrange(start..<min(start + block, lines.count))
                if let candidate = Script(lines: lines, names: best.names).repaired(),
                    candidate.lines.count < best.lines.count,
                    fails(candidate)
                {
                    best = candidate
                    hasShrunk = true
                } else {
                    start += block
                }
            }
            if block == 1, !hasShrunk { return best }
            block = max(1, block / 2)
        }
    }

    /// Without the lines that name what no line makes. Nil: nothing is left.
    private func repaired() -> Script? {
        var script = self
        while !script.lines.isEmpty {
            do throws(InputErrors) {
                return try Script(text: script.source, file: "script")
            } catch {
                let wrong = Set(error.errors.map { $0.line - 2 })
                script.lines = script.lines.enumerated().filter { !wrong.contains($0.offset) }.map(\.element)
            }
        }
        return nil
    }
}
