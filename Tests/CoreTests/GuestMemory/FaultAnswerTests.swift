import Frames
import GuestMemory
import Testing

/// Section 7's table, cell by cell: rows are conditions, columns architectures.
@Suite struct G7_FaultAnswers {
    private static let families: [FaultFamily] = [
        .x86, .arm64, .riscv, .loongArch, .mips, .powerPCHV, .powerPCe500, .powerPCPR,
    ]

    struct Row: CustomTestStringConvertible, Sendable {
        let testDescription: String
        let condition: FaultCondition
        let access: AccessKind
        /// One for each family, in the order above.
        let answers: [FaultAnswer]
    }

    private static let fault: [FaultAnswer] = [
        .fail(.EFAULT), .fail(.EFAULT), .fail(.EFAULT), .emulate, .emulate, .fail(.EFAULT), .fail(.EINVAL),
        .fail(.EINVAL),
    ]
    private static let everywhereEmulated = [FaultAnswer](repeating: .emulate, count: 8)
    private static let fetch: [FaultAnswer] = [
        .emulate, .guestException, .fail(.EOPNOTSUPP), .guestException, .guestException, .guestException,
        .guestException, .guestException,
    ]

    /// The first column of a row is replaced.
    private static func x86(_ first: FaultAnswer, then rest: [FaultAnswer]) -> [FaultAnswer] { [first] + rest[1...] }

    static let rows: [Row] = [
        Row(testDescription: "no slot, load", condition: .noSlot, access: .read, answers: everywhereEmulated),
        Row(testDescription: "no slot, store", condition: .noSlot, access: .write, answers: everywhereEmulated),
        Row(testDescription: "no slot, fetch", condition: .noSlot, access: .execute, answers: fetch),
        Row(
            testDescription: "NOSLOT", condition: .translation(.noSlot), access: .read, answers: everywhereEmulated),
        Row(
            testDescription: "INVALID slot", condition: .invalidSlot, access: .write,
            answers: x86(.retry, then: everywhereEmulated)),
        Row(
            testDescription: "INVALID slot, fetch", condition: .invalidSlot, access: .execute,
            answers: x86(.retry, then: fetch)),
        Row(
            testDescription: "write to a read-only slot", condition: .readOnlySlot, access: .write,
            answers: [
                .emulate, .emulate, .emulate, .emulate, .emulate, .fail(.EFAULT), .fail(.EINVAL), .fail(.EINVAL),
            ]),
        Row(
            testDescription: "read-only PFN map", condition: .translation(.readOnly), access: .write,
            answers: x86(.emulate, then: fault)),
        Row(
            testDescription: "poison", condition: .translation(.hardwarePoison), access: .read,
            answers: [
                .busError, .busError, .busError, .emulate, .emulate, .fail(.EFAULT), .fail(.EINVAL), .fail(.EINVAL),
            ]),
        Row(
            testDescription: "signal pending", condition: .translation(.signalPending), access: .read,
            answers: x86(.interrupted, then: fault)),
        Row(
            testDescription: "private memory, broken", condition: .privateMemory(.EHWPOISON), access: .read,
            answers: x86(.memoryFault(.EHWPOISON), then: fault)),
        Row(
            testDescription: "private and shared mistaken", condition: .privateMemory(.EFAULT), access: .write,
            answers: x86(.memoryFault(.EFAULT), then: fault)),
        Row(testDescription: "fault", condition: .translation(.fault), access: .write, answers: fault),
        Row(
            testDescription: "stale", condition: .stale, access: .write,
            answers: [FaultAnswer](repeating: .retry, count: 8)),
        Row(
            testDescription: "no memory for tables", condition: .noMemory, access: .write,
            answers: [
                .fail(.ENOMEM), .fail(.ENOMEM), .fail(.ENOMEM), .emulate, .emulate, .fail(.ENOMEM), .fail(.ENOMEM),
                .fail(.ENOMEM),
            ]),
        Row(
            testDescription: "dead VM", condition: .dead, access: .read,
            answers: [FaultAnswer](repeating: .fail(.EIO), count: 8)),
    ]

    @Test(arguments: rows)
    func `each architecture answers as its kernel does`(row: Row) {
        #expect(Self.families == FaultFamily.allCases)
        for (family, answer) in zip(Self.families, row.answers) {
            #expect(family.answer(row.condition, row.access) == answer, "\(family)")
        }
    }

    @Test func `what a handler returns says the same`() {
        #expect(FaultAnswer.emulate.outcome == .emulate && FaultAnswer.retry.outcome == .retry)
        #expect(FaultAnswer.fail(.ENOMEM).outcome == .failed(.ENOMEM))
        #expect(FaultAnswer.busError.outcome == .failed(.EHWPOISON))
        #expect(FaultAnswer.interrupted.outcome == .failed(.EINTR))
        #expect(FaultAnswer.memoryFault(.EFAULT).outcome == .memoryFault(.EFAULT))
    }
}
