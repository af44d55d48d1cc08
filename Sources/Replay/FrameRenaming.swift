/// Frames are compared up to renaming: the same frame on one side must be the same on the other, as long as somebody maps
/// it. The machines' allocators differ, so a frame that was given up may come back under any name.
package struct FrameRenaming {
    /// By guest frame: what each side maps there.
    private var current: [UInt64: (recorded: UInt64, model: UInt64)] = [:]
    private var modelOf: [UInt64: (model: UInt64, users: Int)] = [:]
    private var recordedOf: [UInt64: (recorded: UInt64, users: Int)] = [:]

    package init() {}

    /// Notes that `guest` maps `recorded` there and `model` here, a page each. Whether that fits with all that is mapped.
    mutating func note(_ guest: UInt64, recorded: UInt64, model: UInt64) -> Bool {
        forget(guest)
        let fits = (modelOf[recorded]?.model ?? model) == model && (recordedOf[model]?.recorded ?? recorded) == recorded
        guard fits else { return false }
        current[guest] = (recorded, model)
        modelOf[recorded, default: (model, 0)].users += 1
        recordedOf[model, default: (recorded, 0)].users += 1
        return true
    }

    /// Whatever `guest` mapped may be given up.
    mutating func forget(_ guest: UInt64) {
        guard let old = current.removeValue(forKey: guest) else { return }
        if let entry = modelOf[old.recorded] {
            modelOf[old.recorded] = entry.users > 1 ? (entry.model, entry.users - 1) : nil
        }
        if let entry = recordedOf[old.model] {
            recordedOf[old.model] = entry.users > 1 ? (entry.recorded, entry.users - 1) : nil
        }
    }

    package mutating func forget(where isGone: (UInt64) -> Bool) {
        for guest in current.keys.filter(isGone) { forget(guest) }
    }
}
