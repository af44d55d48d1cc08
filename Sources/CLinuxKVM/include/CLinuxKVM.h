// Scripts of memory calls on this machine's `/dev/kvm`, made by processes that do nothing else. Linux on x86-64 only.
//
// A keeper process, forked once, forks a worker for each script; workers fork others. Calls and answers lie in shared memory,
// a batch at a time: nobody waits between two calls of a batch. Messages of a few words through a socket say what begins and
// what has ended. Whatever becomes of a worker, the keeper ends what is left of it; whatever becomes of the one who asks, the
// keeper ends itself and all others. What a process of a script has are its own memory and descriptors, so nothing remains.
#pragma once
#include "CSystemCalls.h"
#include <stddef.h>
#include <stdint.h>

enum {
    /// Of a kind: VMs, files, regions, processes beside the first.
    fl_kvm_most = 256,
    /// vCPUs of a script's VMs together.
    fl_kvm_most_cpus = 1024,
    /// Calls of a batch.
    fl_kvm_batch = 1024,
    /// Words that a batch passes, and words that come back.
    fl_kvm_input_words = 1 << 18,
    fl_kvm_output_words = 1 << 23,
};

/// Where regions of scripts may lie: nothing else is there.
#define FL_KVM_ARENA UINT64_C(0x100000000000)
#define FL_KVM_ARENA_END UINT64_C(0x200000000000)

/// What a call does; what its numbers are.
enum {
    /// subject: the region; kind, size, PROT_*.
    fl_kvm_host = 1,
    /// address, length, PROT_*, MAP_*, offset; subject: the region whose object is mapped, or -1.
    fl_kvm_map,
    fl_kvm_unmap,
    fl_kvm_protect,
    /// address, length, advice.
    fl_kvm_advise,
    /// address, length, new length, MREMAP_*, new address.
    fl_kvm_remap,
    /// subject: the region; size.
    fl_kvm_truncate,
    /// offset, length.
    fl_kvm_punch,
    fl_kvm_splice,
    fl_kvm_drain,
    /// address, count, stride.
    fl_kvm_load,
    /// and the value.
    fl_kvm_store,
    /// subject: the new process.
    fl_kvm_fork,
    fl_kvm_exit,
    /// subject: the VM; type.
    fl_kvm_create_vm,
    /// subject: the vCPU; its VM, its identity.
    fl_kvm_create_cpu,
    fl_kvm_close_vm,
    fl_kvm_close_cpu,
    fl_kvm_close_memfd,
    /// subject: the VM; slot, flags, guest address, size, user address; for the second form also the offset, and the
    /// file, or -1.
    fl_kvm_set_region,
    fl_kvm_set_region2,
    /// slot, whether there is a buffer.
    fl_kvm_get_log,
    /// slot, first page, pages; the words, `fl_kvm_all_ones`, or `fl_kvm_null`.
    fl_kvm_clear_log,
    /// capability, flags; 4 words.
    fl_kvm_enable_cap,
    /// subject: the VM, or -1 for the device; capability.
    fl_kvm_check_extension,
    /// subject: the VM; the file, size, flags.
    fl_kvm_create_memfd,
    /// subject: the file; mode, offset, length.
    fl_kvm_allocate,
    /// subject: the VM; address, size, attributes, flags.
    fl_kvm_set_attributes,
    /// subject: the vCPU; address, size, flags.
    fl_kvm_prefault,
    /// most.
    fl_kvm_collect_ring,
    /// subject: the VM.
    fl_kvm_reset_rings,
    /// subject: the VM; the ioctl's number.
    fl_kvm_no_argument,
    /// subject: the VM; or the vCPU.
    fl_kvm_statistics,
    fl_kvm_cpu_statistics,
    /// subject: the vCPU; `fl_kvm_access_*`, address, bytes, count, stride, value, whether the emulator does it.
    fl_kvm_guest,
};

enum { fl_kvm_read_access, fl_kvm_write_access, fl_kvm_exec_access };

/// What a region is, as the script's word for it.
enum {
    fl_kvm_kind_none,
    fl_kvm_kind_anonymous,
    fl_kvm_kind_shared_anonymous,
    fl_kvm_kind_memfd,
    fl_kvm_kind_memfd_private,
    fl_kvm_kind_file,
    fl_kvm_kind_file_private,
    fl_kvm_kind_secret,
    fl_kvm_kind_hugetlb,
    fl_kvm_kind_hugetlb_private,
    fl_kvm_kind_perf_ring,
    fl_kvm_kind_packet_ring,
};

/// In place of words.
enum { fl_kvm_all_ones = 1, fl_kvm_null = 2 };

typedef struct fl_kvm_call {
    uint32_t operation;
    /// Who calls; 0 is the worker itself.
    uint32_t process;
    int32_t subject;
    uint32_t special;
    uint64_t numbers[8];
    /// Of the input.
    uint32_t first_word, words;
} fl_kvm_call;

/// Why a call could not be made at all.
enum {
    fl_kvm_possible,
    /// The process that should call.
    fl_kvm_no_process,
    /// The call would reach the calling process's own code and data.
    fl_kvm_own_memory,
    /// The host offers none of this kind: the errno says how it refused.
    fl_kvm_no_such_memory,
    /// The guest can't name an address.
    fl_kvm_beyond_width,
    /// The guest's vCPU, or its memory, could not be set up.
    fl_kvm_no_guest,
    /// More words come back than there is room for, or more slots are made.
    fl_kvm_no_room,
    /// A slot whose tables would take too much of the host's memory.
    fl_kvm_too_large,
};

typedef struct fl_kvm_answer {
    uint32_t impossible;
    /// An errno, or 0.
    int32_t error;
    /// SIGSEGV, SIGBUS, or 0.
    int32_t signal;
    /// guest: KVM_EXIT_*, or -1 where there is none.
    int32_t exit;
    /// What the call returned.
    int64_t value;
    /// prefault: what is left. guest, by exit: mmio's phys_addr, data, len and is_write; memory_fault's flags, gpa and
    /// size; internal_error's suberror.
    uint64_t fields[4];
    /// guest, load, store: accesses made.
    uint64_t done;
    /// Of the output: values, log, ring entries of 2 words, bytes of statistics in whole words.
    uint32_t first_word, words;
    /// How many system calls the script had made before.
    uint64_t calls_before;
} fl_kvm_answer;

/// Where the executor's own slot lies: the guest's code and page tables, 256 KiB, that no call of the script touches.
typedef struct fl_kvm_place {
    uint32_t slot;
    uint64_t guest_address;
} fl_kvm_place;
enum { fl_kvm_own_bytes = 256 << 10 };

/// The pages of the executor's own slot. Spec: real-kvm, "A guest that runs natively".
enum {
    fl_kvm_own_code,
    /// Zeros, for the processor's task state.
    fl_kvm_own_task,
    /// Where registers point while unknown code is executed.
    fl_kvm_own_scratch,
    /// What a program has read.
    fl_kvm_own_values,
    fl_kvm_own_root,
    fl_kvm_own_tables,
};

/// Of the programs that the guest executes, from the code page's beginning: the first instruction, that of the access, and
/// the OUT at the end.
typedef struct fl_kvm_program {
    uint64_t first, access, out;
} fl_kvm_program;
fl_kvm_program fl_kvm_program_of(int writes, uint64_t bytes);

/// How a start, a beginning or a batch ended.
enum {
    fl_kvm_ready,
    /// All calls up to `step` have answers.
    fl_kvm_done,
    /// A process ended that should not: `status` as waitpid says, or -1.
    fl_kvm_died,
    /// The call `step` took too long; all processes of the script have been ended.
    fl_kvm_hung,
    /// A process can't be ended even by SIGKILL.
    fl_kvm_stuck,
    /// The keeper is gone or does not answer; or could not begin: `status` is an errno, `reason` what failed.
    fl_kvm_broken,
};

/// What a start or a beginning failed at.
enum {
    fl_kvm_at_start = 1,
    fl_kvm_at_device,
    fl_kvm_at_version,
    fl_kvm_at_capability,
    fl_kvm_at_arena,
    fl_kvm_at_worker,
    fl_kvm_at_limits,
    /// Recording is for root.
    fl_kvm_at_rights,
    fl_kvm_at_tracing,
};

typedef struct fl_kvm_end {
    uint32_t kind;
    /// Of the batch.
    uint32_t step;
    int32_t status;
    uint32_t reason;
} fl_kvm_end;

typedef struct fl_kvm fl_kvm;

typedef struct fl_kvm_options {
    /// Null: `/dev/kvm`.
    const char *device;
    /// Forced failures: of the start in this process, of the keeper.
    fl_switch start, keeper;
    /// Bytes of private memory of each process beyond what it begins with.
    uint64_t private_memory;
    /// A cgroup of the caller's in which the child makes one of its own, with so many bytes; null: none.
    const char *memory_group;
    uint64_t group_bytes;
    /// Seconds of processor time of each process.
    uint64_t processor_seconds;
    /// Pages of the largest slot: shadow paging keeps a word and more for each.
    uint64_t slot_pages;
    /// Whether memory may be made of huge pages, as the machine is set up.
    uint64_t huge_pages;
    /// Whether a private instance of tracefs records what KVM does for the scripts.
    uint64_t records;
} fl_kvm_options;

/// Starts the keeper. Null, and what failed, if it can't be.
fl_kvm *fl_kvm_start(const fl_kvm_options *options, fl_kvm_end *end);
void fl_kvm_stop(fl_kvm *kvm);

/// Ends the last script's processes and starts the next one's first.
void fl_kvm_begin(fl_kvm *kvm, fl_kvm_place place, uint64_t forced, int32_t error, fl_kvm_end *end);
/// Ends the script's processes.
void fl_kvm_finish(fl_kvm *kvm, fl_kvm_end *end);
/// Has the first `count` calls made, each within a time.
void fl_kvm_run(fl_kvm *kvm, uint32_t count, int milliseconds, fl_kvm_end *end);

fl_kvm_call *fl_kvm_calls(fl_kvm *kvm);
uint64_t *fl_kvm_input(fl_kvm *kvm);
const fl_kvm_answer *fl_kvm_answers(const fl_kvm *kvm);
const uint64_t *fl_kvm_output(const fl_kvm *kvm);
/// System calls that the script has made so far, and those of the keeper.
uint64_t fl_kvm_calls_made(const fl_kvm *kvm);
uint64_t fl_kvm_keeper_calls_made(const fl_kvm *kvm);
/// Slots of more pages have tables that the cgroup has no memory for, on shadow paging; 0: nobody knows of any.
uint64_t fl_kvm_refused_pages(const fl_kvm *kvm);
/// Bits of a guest's address.
uint32_t fl_kvm_guest_width(const fl_kvm *kvm);
/// The instance of tracefs, by name; empty: nothing is recorded. What it has recorded is read in the keeper's file system.
const char *fl_kvm_instance(const fl_kvm *kvm);
/// The keeper's and the worker's process numbers.
int32_t fl_kvm_keeper(const fl_kvm *kvm);
int32_t fl_kvm_worker(const fl_kvm *kvm);
