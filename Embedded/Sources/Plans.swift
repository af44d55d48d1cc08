import Frames
import Machine

@_extern(c, "fopen") private func openFile(_ path: UnsafePointer<CChar>, _ mode: UnsafePointer<CChar>) -> OpaquePointer?
@_extern(c, "fgetc") private func readByte(_ file: OpaquePointer) -> Int32
@_extern(c, "fclose") private func closeFile(_ file: OpaquePointer) -> Int32
@_extern(c, "putchar") private func putByte(_ byte: Int32) -> Int32

/// Runs the plan in the file at `path` under every policy on every architecture that it fits, a line each: the digest
/// that the hosted command prints for the same scenario. False: the file is no plan.
func runPlan(at path: UnsafePointer<CChar>) -> Bool {
    guard let bytes = contents(of: path) else { return false }
    let plan: Plan
    do throws(PlanDecodingError) {
        plan = try Plan(decoding: bytes)
    } catch {
        return false
    }
    for architecture in Architecture.allCases where plan.fits(architecture) {
        for policy in PolicyName.allCases where !run(plan, policy, architecture) { return false }
    }
    return true
}

private func run(_ plan: Plan, _ policy: PolicyName, _ architecture: Architecture) -> Bool {
    let size = World.arenaSize(for: plan)
    let arena = UnsafeMutableRawPointer.allocate(byteCount: size, alignment: Int(pageSize))
    defer { arena.deallocate() }
    do throws(PlanError) {
        let world = try World(plan, policy: policy, architecture: architecture, arena: arena, arenaIsZero: false)
        for byte in world.run().digest() { _ = putByte(Int32(byte)) }
        _ = putByte(10)
        return true
    } catch {
        return false
    }
}

private func contents(of path: UnsafePointer<CChar>) -> [UInt8]? {
    var mode: (CChar, CChar, CChar) = (114, 98, 0)  // "rb"
    return withUnsafePointer(to: &mode) { mode in
        mode.withMemoryRebound(to: CChar.self, capacity: 3) { mode in
            guard let file = openFile(path, mode) else { return nil }
            defer { _ = closeFile(file) }
            var bytes: [UInt8] = []
            while case let byte = readByte(file), byte >= 0 { bytes.append(UInt8(truncatingIfNeeded: byte)) }
            return bytes
        }
    }
}
