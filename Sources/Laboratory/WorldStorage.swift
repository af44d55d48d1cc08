import Frames
import HostMemory
import Machine

/// The memory of one world after another.
final class WorldStorage {
    private let plan: Plan
    private var arena: MappedArena
    private(set) var memory: MemoryStorage

    /// Nil: no room.
    init?(for plan: Plan) {
        self.plan = plan
        guard let arena = MappedArena(size: World.arenaSize(for: plan)) else { return nil }
        self.arena = arena
        memory = Self.make(plan, arena)
    }

    private static func make(_ plan: Plan, _ arena: MappedArena) -> MemoryStorage {
        MemoryStorage(arena: arena.base, ramFrames: plan.ramFrames, deviceFrames: plan.deviceFrames)
    }

    /// New memory in the same place: a world that can't be ended still believes that the old is its own, and is never run
    /// again. The bytes are all made zero.
    func replace() {
        lost.append(memory)
        arena.forget()
        memory = Self.make(plan, arena)
    }
    /// A world that was given up may hold on to its page frames for ever.
    private var lost: [MemoryStorage] = []
}
