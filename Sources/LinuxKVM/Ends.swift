import CLinuxKVM
import IoctlScript

// What ended a start, a beginning or a batch, in words.

extension RealRun.Unavailable {
    init(_ end: fl_kvm_end, path: String) {
        let errno = errnoName(end.status)
        reason =
            switch Int(end.reason) {
            case fl_kvm_at_device: "\(path) can't be opened: \(errno)"
            case fl_kvm_at_version: "\(path) is no KVM that this program knows"
            case fl_kvm_at_capability: "the KVM of \(path) lacks what a guest here needs"
            case fl_kvm_at_arena: "the addresses that scripts use are taken in this process"
            case fl_kvm_at_limits: "the child process's limits can't be set: \(errno)"
            case fl_kvm_at_rights: "what a kernel does can be recorded by root alone: \(errno)"
            case fl_kvm_at_tracing: "this kernel's tracefs can't be used for recording: \(errno)"
            case fl_kvm_at_worker: "no process can be started for a script: \(errno)"
            default: "the child process could not be prepared: \(errno)"
            }
    }
}

extension fl_kvm_end {
    func text(deadline: Int) -> String {
        switch Int(kind) {
        case fl_kvm_hung: "the call did not return within \(deadline) ms, and its process was ended"
        case fl_kvm_stuck: "the call did not return within \(deadline) ms, and its process can't be ended"
        case fl_kvm_died where status > 0 && status & 0x7f != 0:
            "the process that made the call was ended by \(signalName(status & 0x7f))"
        case fl_kvm_died where status >= 0: "the process that made the call ended with status \(status >> 8 & 0xff)"
        case fl_kvm_died: "the process that made the call has ended"
        default: "the child process has ended"
        }
    }
}
