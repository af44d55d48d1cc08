import CKVMInterface
import CLinuxKVM
import Glibc
import IoctlScript

/// What the child answers, in the words that the model has for it.
struct AnswerDecoding {
    /// The output, which answers point into.
    let words: UnsafePointer<UInt64>
    /// Bits of a guest's address.
    let width: UInt32

    func answer(to step: Step, _ raw: fl_kvm_answer) -> Answer {
        if raw.impossible != UInt32(fl_kvm_possible) {
            return Answer(.notHere(reason(step, raw)), raw.done > 0 ? [.init("done", .decimal(raw.done))] : [])
        }
        let outcome: Answer.Outcome = raw.error == 0 ? .returned(raw.value) : .failed(raw.error)
        switch step {
        case .load(_, let repetition), .store(_, let repetition, _): return accesses(repetition, raw)
        case .guest(_, let access): return Answer(outcome, raw.isUnheard ? [] : exitFields(access.kind, raw))
        case _ where raw.error != 0: return Answer(outcome)
        case _ where raw.signal != 0: return Answer(.signal(signalName(raw.signal)))
        case .getDirtyLog(_, _, let hasBuffer):
            return Answer(outcome, hasBuffer ? [.init("bits", .list(list(raw)))] : [])
        case .preFault:
            return Answer(outcome, [.init("gpa", .hex(raw.fields.0)), .init("size", .hex(raw.fields.1))])
        case .collectRing:
            let entries = stride(from: 0, to: Int(raw.words), by: 2).map { index in
                let place = Int(raw.first_word) + index
                return RingEntry(slot: UInt32(words[place]), offset: words[place + 1])
            }
            return Answer(
                outcome, [.init("count", .decimal(UInt64(entries.count))), .init("entries", .entries(entries))])
        case .statistics(_, _, let names):
            let content = StatisticsContent(bytes(raw))
            return Answer(
                outcome,
                names.map { name in .init(name, content.value(of: name).map { .decimal($0) } ?? .word("none")) })
        default: return Answer(outcome)
        }
    }

    private func list(_ raw: fl_kvm_answer) -> [UInt64] {
        Array(UnsafeBufferPointer(start: words + Int(raw.first_word), count: Int(raw.words)))
    }

    private func bytes(_ raw: fl_kvm_answer) -> [UInt8] {
        Array(UnsafeRawBufferPointer(UnsafeBufferPointer(start: words + Int(raw.first_word), count: Int(raw.words))))
    }

    private func accesses(_ repetition: Repetition, _ raw: fl_kvm_answer) -> Answer {
        var fields: [Answer.Field] = []
        if raw.done < repetition.count { fields.append(.init("done", .decimal(raw.done))) }
        if raw.words > 0 { fields.append(.init("values", .list(list(raw)))) }
        return Answer(raw.signal == 0 ? .returned(0) : .signal(signalName(raw.signal)), fields)
    }

    // MARK: The guest

    /// The exit's reason and fields; then what was done.
    private func exitFields(_ kind: GuestAccess.Kind, _ raw: fl_kvm_answer) -> [Answer.Field] {
        var fields: [Answer.Field] = []
        if raw.exit >= 0 { fields.append(.init("exit", .word(exitName(Int(raw.exit))))) }
        switch Int(raw.exit) {
        case KVM_EXIT_MMIO:
            fields += [
                .init("phys_addr", .hex(raw.fields.0)), .init("len", .decimal(raw.fields.2)),
                .init("is_write", .decimal(raw.fields.3)),
            ]
            if raw.fields.3 != 0 { fields.append(.init("data", .hex(raw.fields.1))) }
        case KVM_EXIT_INTERNAL_ERROR: fields.append(.init("suberror", .decimal(raw.fields.0)))
        case KVM_EXIT_MEMORY_FAULT:
            fields += [
                .init("flags", .hex(raw.fields.0)), .init("gpa", .hex(raw.fields.1)), .init("size", .hex(raw.fields.2)),
            ]
        default: break
        }
        fields.append(.init("done", .decimal(raw.done)))
        if kind == .read, raw.words > 0 { fields.append(.init("values", .list(list(raw)))) }
        return fields
    }

    private func exitName(_ reason: Int) -> String {
        switch reason {
        case KVM_EXIT_IO: "io"
        case KVM_EXIT_MMIO: "mmio"
        case KVM_EXIT_INTR: "intr"
        case KVM_EXIT_DIRTY_RING_FULL: "dirty_ring_full"
        case KVM_EXIT_INTERNAL_ERROR: "internal_error"
        case KVM_EXIT_MEMORY_FAULT: "memory_fault"
        case KVM_EXIT_SHUTDOWN: "shutdown"
        case KVM_EXIT_HLT: "hlt"
        case KVM_EXIT_FAIL_ENTRY: "fail_entry"
        default: "reason_\(reason)"
        }
    }

    // MARK: What can't be done

    private func reason(_ step: Step, _ raw: fl_kvm_answer) -> String {
        switch Int(raw.impossible) {
        case fl_kvm_no_process: "the process could not be made"
        case fl_kvm_own_memory: "the calling process has memory of its own there"
        case fl_kvm_no_such_memory: "this machine gives no \(step.kind): \(errnoName(raw.error))"
        case fl_kvm_beyond_width: "a guest's addresses have \(width) bits here"
        case fl_kvm_no_guest: "no guest can be set up: \(errnoName(raw.error))"
        case fl_kvm_too_large: "the slot's tables would take too much of this machine's memory"
        default: "more comes back than there is room for"
        }
    }
}

extension fl_kvm_answer {
    /// KVM_RUN was refused before the guest began, because of who called or which descriptor: its shared page says nothing.
    fileprivate var isUnheard: Bool { error == EBADF || error == EIO }
}

extension Step {
    fileprivate var kind: String { if case .host(_, let kind, _, _) = self { kind.rawValue } else { "memory" } }
}

/// Linux's names of those that a process can get by an access, or be ended by.
func signalName(_ number: Int32) -> String {
    switch number {
    case 4: "SIGILL"
    case 6: "SIGABRT"
    case 7: "SIGBUS"
    case 8: "SIGFPE"
    case 9: "SIGKILL"
    case 11: "SIGSEGV"
    case 15: "SIGTERM"
    case 24: "SIGXCPU"
    case 25: "SIGXFSZ"
    case 31: "SIGSYS"
    default: "signal \(number)"
    }
}
