// What the one who asks, the keeper and the workers share, and what each worker has of its own.
#pragma once
#include "CKVMInterface.h"
#include "CLinuxKVM.h"
#include <stdatomic.h>

enum { nobody = -1, fl_kvm_most_slots = 4096, fl_most_cpuid = 256, fl_most_path = 1024, fl_page = 4096 };

/// A VM of the script. Descriptors belong to all processes of a script alike: they share one table of them.
typedef struct fl_vm {
    int fd;  ///< -1: none
    uint32_t maker;  ///< the process
    /// The executor's own slot is there, as of this count of `own_memory.age`; 0: it is not.
    uint32_t own_slot;
    int own_error;  ///< why it is not
    uint64_t ring_bytes;
} fl_vm;

typedef struct fl_cpu {
    int fd;
    int vm;
    uint32_t maker;
    int ready;         ///< CPUID has been set
    int mode;          ///< of the system registers: `fl_mode_*`
    uint32_t next;     ///< the ring's next entry to read, free-running
} fl_cpu;

typedef struct fl_region {
    int fd;
    uint32_t kind;
} fl_region;

/// A slot that the script has made: KVM_GET_DIRTY_LOG needs to know how large it is.
typedef struct fl_slot {
    int vm;
    uint32_t number;
    uint64_t pages;
} fl_slot;

typedef struct fl_shared {
    fl_switch worker_calls, keeper_calls;
    fl_kvm_options options;
    char group[fl_most_path];  ///< a file to write one's number to; empty: none
    // What the keeper found out.
    uint32_t guest_width;
    int device;
    struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[fl_most_cpuid];
    } cpuid;  ///< what the host's KVM can show a guest
    /// Where the kernel has no memory for a slot's tables it says so, of slots of more pages than this; 0: it ends processes.
    uint64_t refused_pages;
    uint64_t own_low, own_below;  ///< the processes' own memory: from here on, and below here
    /// The instance of tracefs, and its file for marks; empty, and 0: nothing is recorded.
    char instance[64];
    int marker;
    uint64_t calls_done;  ///< of the script
    _Atomic int keeper, worker;  ///< process numbers; the worker's is also its group's
    // The script.
    uint32_t script;
    fl_kvm_place place;
    fl_vm vms[fl_kvm_most];
    fl_cpu cpus[fl_kvm_most_cpus];
    fl_region regions[fl_kvm_most];
    int memfds[fl_kvm_most];
    _Atomic int processes[fl_kvm_most + 1];  ///< process numbers; 0: not there
    fl_slot slots[fl_kvm_most_slots];
    uint32_t slot_count;
    // The batch.
    _Atomic int turn;
    int leaving;  ///< a process number that must be gone before the next call; 0: none
    _Atomic uint32_t current;
    uint32_t count;
    uint64_t words;  ///< of the output that are taken
    fl_kvm_call calls[fl_kvm_batch];
    fl_kvm_answer answers[fl_kvm_batch];
    uint64_t input[fl_kvm_input_words];
    uint64_t output[fl_kvm_output_words];
} fl_shared;

/// A message between the one who asks and the others.
typedef struct fl_frame {
    uint32_t kind;  ///< `fl_kvm_ready`... upwards; `fl_frame_*` downwards
    uint32_t script;
    uint32_t step;
    int32_t status;
    uint32_t reason;
} fl_frame;
enum { fl_frame_begin = 100, fl_frame_finish };

enum { fl_mode_unknown, fl_mode_native, fl_mode_privileged };

/// A worker's own state.
typedef struct fl_worker {
    fl_shared *all;
    uint32_t process;
    int talk;  ///< the socket
    int life;  ///< a pipe whose other end only the keeper has
    /// Where the shared pages of vCPUs, and their rings, are mapped; null: nowhere yet.
    struct kvm_run *runs[fl_kvm_most_cpus];
    struct kvm_dirty_gfn *rings[fl_kvm_most_cpus];
    uint8_t *own_memory;
    uint32_t own_age;  ///< counts how often its page tables began anew; 0: there is no memory
    uint32_t own_tables;  ///< pages of tables that are in use
} fl_worker;

/// A counted system call of a worker.
long fl_make(fl_worker *w, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f);
long fl_ioctl(fl_worker *w, int fd, uint32_t request, void *argument);
void fl_fail(fl_kvm_answer *answer, uint32_t impossible, long error);
/// The answer of a call that returned `result`.
void fl_answer(fl_kvm_answer *answer, long result);
/// `words` of the output, zeroed; null: there is no room in what is left of it.
uint64_t *fl_take_words(fl_worker *w, fl_kvm_answer *answer, uint64_t words);

void fl_forget_pipe(void);
void fl_drain(void);
void fl_host_step(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer);
void fl_kvm_step(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer);
void fl_guest_step(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer);
/// Whether bytes of the calling process's own would be reached.
int fl_is_own(const fl_worker *w, uint64_t address, uint64_t length);
/// Makes the executor's own slot, or deletes it: 0, or minus an errno.
long fl_own_slot(fl_worker *w, fl_vm *vm, int exists);
/// Forgets the mappings that a new process has not.
void fl_forget_mappings(fl_worker *w);
/// Maps a descriptor's pages where forks don't have them; minus an errno.
long fl_map_pages(fl_worker *w, int fd, uint64_t bytes, uint64_t offset);

/// Mounts tracefs for this process alone and makes an instance of it. 0, or what failed.
uint32_t fl_trace_open(fl_shared *all, long *error);
/// Removes the instance, if there is one.
void fl_trace_close(fl_shared *all);
/// Removes the instance of a keeper that was killed; in a process made for that, whose view of mounts it changes.
void fl_trace_clear(fl_shared *all);
/// Records what the keeper's children do from here on, in an empty buffer. Minus an errno. Nothing happens where there is no
/// instance.
long fl_trace_begin(fl_shared *all);
long fl_trace_end(fl_shared *all);
/// Notes in the recording that the next call begins, or has ended.
void fl_mark(const fl_shared *all, const char *what);

_Noreturn void fl_serve(fl_worker *w);
_Noreturn void fl_keep(fl_shared *all, int talk);
