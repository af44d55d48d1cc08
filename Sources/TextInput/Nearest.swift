/// The word of `words` that `word` was probably meant to be.
package func nearest(_ word: String, in words: [String]) -> String? {
    var best: (distance: Int, word: String)?
    for candidate in words {
        let distance = editDistance(Array(word.utf8), Array(candidate.utf8))
        // A third of the letters may be wrong; beyond that it is another word.
        guard distance <= max(1, candidate.utf8.count / 3), distance < (best?.distance ?? .max) else { continue }
        best = (distance, candidate)
    }
    return best?.word
}

/// Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`.
private func editDistance(_ a: [UInt8], _ b: [UInt8]) -> Int {
    guard a.count <= 64 else { return .max }
    var beforeLast: [Int] = []
    var last = Array(0...b.count)
    for i in a.indices {
        var row = [i + 1]
        for j in b.indices {
            var cost = min(last[j + 1] + 1, row[j] + 1, last[j] + (a[i] == b[j] ? 0 : 1))
            if i > 0 && j > 0 && a[i] == b[j - 1] && a[i - 1] == b[j] { cost = min(cost, beforeLast[j - 1] + 1) }
            row.append(cost)
        }
        beforeLast = last
        last = row
    }
    return last[b.count]
}
