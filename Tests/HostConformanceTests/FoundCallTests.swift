import Frames
import HostMemory
import Testing

@testable import HostConformance

/// Sequences in which the model once differed from the kernel, shrunk: they must not again.
@Suite(.serialized) struct HostConformance_FoundCalls {
    private static let reason: String? = {
        do throws(HostConformance.Unavailable) {
            _ = try HostConformance()
            return nil
        } catch {
            return error.reason
        }
    }()

    static let sequences: [[HostCall]] = [
        // A page of a memfd that only was read has nothing to go to the swap device.
        [
            .map(process: 0, pages: 0..<4, .file(0, firstPage: 0, shared: true), .readWrite),
            .load(process: 0, page: 1, word: 0), .advise(process: 0, pages: 0..<4, .pageOut),
            .truncate(file: 0, bytes: 4096 + 8), .load(process: 0, page: 0, word: 0),
        ],
        // A VMA that can be one with either neighbour, which can't be one with each other, joins the one before.
        [
            .map(process: 0, pages: 28..<36, .file(1, firstPage: 4, shared: false), .readWrite),
            .protect(process: 0, pages: 33..<34, .read), .store(process: 0, page: 35, word: 1, 1),
            .writeFile(file: 1, page: 11, word: 77, 11), .store(process: 0, page: 28, word: 0, 12),
            .protect(process: 0, pages: 29..<37, .readWrite), .load(process: 0, page: 33, word: 0),
        ],
        // A page whose slot was given up is dirty: MADV_FREE leaves it where another process maps it too.
        [
            .map(process: 0, pages: 24..<25, .anonymous, .readWrite), .store(process: 0, page: 24, word: 77, 3),
            .advise(process: 0, pages: 24..<32, .pageOut), .fork(process: 0, child: 1),
            .store(process: 1, page: 24, word: 511, 4), .store(process: 0, page: 24, word: 0, 9),
            .fork(process: 0, child: 3), .advise(process: 0, pages: 24..<25, .free),
            .store(process: 3, page: 24, word: 0, 14), .advise(process: 0, pages: 24..<25, .pageOut),
        ],
        // One that was read back for the only entry of its slot is not: there MADV_FREE takes it.
        [
            .map(process: 0, pages: 44..<45, .anonymous, .readWrite), .store(process: 0, page: 44, word: 0, 5),
            .advise(process: 0, pages: 44..<45, .pageOut), .load(process: 0, page: 44, word: 511),
            .fork(process: 0, child: 1), .advise(process: 0, pages: 44..<47, .free),
            .store(process: 0, page: 44, word: 511, 7), .advise(process: 1, pages: 44..<47, .pageOut),
        ],
        // An area that grows by mremap becomes one with the next, though its parent may find its pages.
        [
            .map(process: 0, pages: 10..<30, .anonymous, Protection(write: true)), .unmap(process: 0, pages: 24..<25),
            .store(process: 0, page: 11, word: 1, 7), .fork(process: 0, child: 1),
            .remap(process: 1, pages: 17..<24, count: 8, to: nil),
        ],
        // The tail of a page that is swapped out when its object is made to end in it.
        [
            .writeFile(file: 0, page: 6, word: 1, 3),
            .map(process: 0, pages: 59..<61, .file(0, firstPage: 0, shared: true), .readWrite),
            .store(process: 0, page: 59, word: 511, 15), .advise(process: 0, pages: 58..<64, .pageOut),
            .truncate(file: 0, bytes: 4080), .load(process: 0, page: 60, word: 0), .truncate(file: 0, bytes: 8192),
            .load(process: 0, page: 59, word: 511),
        ],
        // MADV_POPULATE_WRITE makes a page dirty that MADV_FREE gave up.
        [
            .map(process: 0, pages: 12..<16, .anonymous, .readWrite), .store(process: 0, page: 13, word: 77, 3),
            .advise(process: 0, pages: 12..<14, .free), .advise(process: 0, pages: 13..<14, .populateWrite),
            .fork(process: 0, child: 1), .store(process: 0, page: 13, word: 0, 4),
            .advise(process: 1, pages: 13..<16, .pageOut), .load(process: 1, page: 13, word: 77),
        ],
        // A page without rights is paged out like any other.
        [
            .map(process: 0, pages: 18..<22, .anonymous, .readWrite), .store(process: 0, page: 18, word: 0, 1),
            .protect(process: 0, pages: 18..<22, .none), .advise(process: 0, pages: 18..<22, .pageOut),
            .protect(process: 0, pages: 18..<22, .read), .load(process: 0, page: 18, word: 0),
        ],
        // Nor where the mapping moves: what is there does, also when the length reaches past the end of memory.
        [
            .map(process: 0, pages: 54..<58, .file(1, firstPage: 4, shared: false), .readWrite),
            .raw(
                process: 0,
                RawCall(
                    name: .mremap, address: 0x1000_0003_6000, length: 0x1000, argument: 0x1000, flags: 3,
                    last: 0x7fff_ffff_e000)),
            .raw(
                process: 0,
                RawCall(
                    name: .mremap, address: 0x7fff_ffff_e000, length: 0x4000, argument: 0x4000, flags: 3,
                    last: 0x1000_0001_0000)),
        ],
        // A length that stays is not looked at.
        [
            .raw(
                process: 0,
                RawCall(
                    name: .mmap, address: 0x7fff_ffff_e000, length: 0x1000, argument: 0, flags: 0x10_0021, last: 0)),
            .raw(
                process: 0,
                RawCall(name: .mremap, address: 0x7fff_ffff_e000, length: 0x2000, argument: 0x2000, flags: 0)),
        ],
    ]

    @Test(.enabled(if: reason == nil, Comment(rawValue: reason ?? "")), arguments: sequences.indices)
    func `a sequence that once differed does not`(number: Int) throws {
        let conformance = try HostConformance()
        let calls = Self.sequences[number].filter { call in
            guard case .advise(_, _, .pageOut) = call else { return true }
            return conformance.hasSwap
        }
        let difference = try conformance.play(calls)
        #expect(difference == nil, "\(difference?.description ?? "")")
    }
}
