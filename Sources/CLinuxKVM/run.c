#define _GNU_SOURCE
#include "shared.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

struct fl_kvm {
    fl_shared *shared;
    int talk;
    int keeper;
    uint32_t script;
    char group[fl_most_path];  ///< the cgroup that was made; empty: none
};

#if defined(__linux__) && defined(__x86_64__)

enum { keeper_milliseconds = 30000 };

static void set_end(fl_kvm_end *end, uint32_t kind, uint32_t reason, long status) {
    *end = (fl_kvm_end){.kind = kind, .status = (int32_t)status, .reason = reason};
}

// MARK: Messages

/// Whether the keeper has ended; it stays to be waited for.
static int has_ended(const fl_kvm *kvm) {
    siginfo_t info = {0};
    uint64_t how = WEXITED | WNOHANG | WNOWAIT;
    return fl_plain(SYS_waitid, P_PID, (uint64_t)kvm->keeper, (uint64_t)&info, how, 0, 0) == 0 && info.si_pid;
}

/// A message, in so many milliseconds: 1; 0: none came; -1: there is nobody any more.
static int hear(fl_kvm *kvm, fl_frame *frame, int milliseconds) {
    struct pollfd wait = {.fd = kvm->talk, .events = POLLIN};
    long ready = fl_plain(SYS_poll, (uint64_t)&wait, 1, (uint64_t)milliseconds, 0, 0, 0);
    // Its workers have the socket too.
    if (ready == 0) return has_ended(kvm) ? -1 : 0;
    if (ready == -EINTR) return 0;
    if (ready < 0) return -1;
    long got = fl_plain(SYS_recvfrom, (uint64_t)kvm->talk, (uint64_t)frame, sizeof *frame, MSG_DONTWAIT, 0, 0);
    if (got == -EAGAIN || got == -EINTR) return 0;
    return got == sizeof *frame ? 1 : -1;
}

/// Sends a command and waits for what the keeper says to it.
static void command(fl_kvm *kvm, uint32_t kind, fl_kvm_end *end) {
    fl_frame frame = {.kind = kind, .script = ++kvm->script};
    int64_t start = fl_milliseconds();
    fl_plain(SYS_sendto, (uint64_t)kvm->talk, (uint64_t)&frame, sizeof frame, MSG_NOSIGNAL, 0, 0);
    while (fl_milliseconds() - start < keeper_milliseconds) {
        int heard = hear(kvm, &frame, 100);
        if (heard < 0) break;
        if (heard && (frame.kind == fl_kvm_stuck || frame.script == kvm->script)) {
            set_end(end, frame.kind, frame.reason, frame.status);
            return;
        }
    }
    set_end(end, fl_kvm_broken, fl_kvm_at_worker, ESRCH);
}

// MARK: The cgroup

static void remove_group(fl_kvm *kvm) {
    int64_t start = fl_milliseconds();
    // Busy until the kernel has taken note that the last process is gone.
    while (kvm->group[0] && fl_plain(SYS_rmdir, (uint64_t)kvm->group, 0, 0, 0, 0, 0) == -EBUSY &&
           fl_milliseconds() - start < 2000)
        fl_plain(SYS_poll, 0, 0, 10, 0, 0, 0);
}

static long write_file(const char *folder, const char *name, const char *text, fl_switch *calls) {
    char path[fl_most_path];
    if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path) return -ENAMETOOLONG;
    long fd = fl_call(calls, SYS_open, (uint64_t)path, O_WRONLY | O_CLOEXEC, 0, 0, 0, 0);
    if (fd < 0) return fd;
    long done = fl_call(calls, SYS_write, (uint64_t)fd, (uint64_t)text, strlen(text), 0, 0, 0);
    fl_plain(SYS_close, (uint64_t)fd, 0, 0, 0, 0, 0);
    return done;
}

/// A cgroup of the child's own below the caller's, in either version of cgroups. 0, or minus an errno.
static long make_group(fl_kvm *kvm, const fl_kvm_options *options, fl_switch *calls) {
    static _Atomic int count;
    char path[fl_most_path], limit[32];
    int number = (int)fl_plain(SYS_getpid, 0, 0, 0, 0, 0, 0);
    int length = snprintf(
        path, sizeof path, "%s/faultline-%d-%d", options->memory_group, number, atomic_fetch_add(&count, 1));
    if (length + 16 > (int)sizeof path) return -ENAMETOOLONG;
    long failed = fl_call(calls, SYS_mkdir, (uint64_t)path, 0755, 0, 0, 0, 0);
    if (failed < 0) return failed;
    memcpy(kvm->group, path, sizeof path);
    snprintf(limit, sizeof limit, "%llu", (unsigned long long)options->group_bytes);
    failed = write_file(path, "memory.max", limit, calls);
    if (failed == -ENOENT) failed = write_file(path, "memory.limit_in_bytes", limit, calls);
    if (failed < 0) return failed;
    // Where a cgroup can be told not to end processes, of version 1, the kernel's own requests for memory fail instead.
    if (write_file(path, "memory.oom_control", "1", calls) >= 0) kvm->shared->refused_pages = options->group_bytes / 8;
    snprintf(kvm->shared->group, sizeof kvm->shared->group, "%.1000s/cgroup.procs", path);
    return 0;
}

// MARK: The keeper

static void release(fl_kvm *kvm) {
    remove_group(kvm);
    if (kvm->talk >= 0) fl_plain(SYS_close, (uint64_t)kvm->talk, 0, 0, 0, 0, 0);
    if (kvm->shared) fl_plain(SYS_munmap, (uint64_t)kvm->shared, sizeof *kvm->shared, 0, 0, 0, 0);
    free(kvm);
}

/// 0, or minus an errno.
static long start_keeper(fl_kvm *kvm, const fl_kvm_options *options, fl_switch *calls) {
    long at = fl_call(
        calls, SYS_mmap, 0, sizeof *kvm->shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE,
        UINT64_MAX, 0);
    if (at < 0) return at;
    fl_shared *all = kvm->shared = (fl_shared *)at;
    int ends[2];
    long failed = fl_call(calls, SYS_socketpair, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, (uint64_t)ends, 0, 0);
    if (failed < 0) return failed;
    kvm->talk = ends[0];
    all->options = *options;
    all->keeper_calls = options->keeper;
    all->device = -1;
    long pid = options->memory_group ? make_group(kvm, options, calls) : 0;
    if (pid >= 0) pid = fl_call(calls, SYS_clone, SIGCHLD, 0, 0, 0, 0, 0);
    if (pid == 0) fl_keep(all, ends[1]);
    fl_plain(SYS_close, (uint64_t)ends[1], 0, 0, 0, 0, 0);
    kvm->keeper = pid < 0 ? 0 : (int)pid;
    return pid;
}

/// The keeper was killed, and could not remove what it had made.
static void remove_instance(fl_kvm *kvm) {
    if (!kvm->shared->instance[0]) return;
    long pid = fl_plain(SYS_clone, SIGCHLD, 0, 0, 0, 0, 0);
    if (pid == 0) {
        fl_trace_clear(kvm->shared);
        for (;;) fl_plain(SYS_exit_group, 0, 0, 0, 0, 0, 0);
    }
    if (pid > 0) fl_plain(SYS_wait4, (uint64_t)pid, 0, 0, 0, 0, 0);
}

/// Waits for the keeper's end; after a while it is ended.
static void await_keeper(fl_kvm *kvm) {
    int64_t start = fl_milliseconds();
    int status = 0;
    while (fl_plain(SYS_wait4, (uint64_t)kvm->keeper, (uint64_t)&status, WNOHANG, 0, 0, 0) == 0) {
        if (fl_milliseconds() - start > keeper_milliseconds / 2)
            fl_plain(SYS_kill, (uint64_t)kvm->keeper, SIGKILL, 0, 0, 0, 0);
        if (fl_milliseconds() - start > keeper_milliseconds) return;
        fl_plain(SYS_poll, 0, 0, 1, 0, 0, 0);
    }
    if (WIFSIGNALED(status)) remove_instance(kvm);
}

fl_kvm *fl_kvm_start(const fl_kvm_options *options, fl_kvm_end *end) {
    fl_switch calls = options->start;
    fl_kvm *kvm = calloc(1, sizeof *kvm);
    set_end(end, fl_kvm_broken, fl_kvm_at_start, ENOMEM);
    if (!kvm) return 0;
    kvm->talk = -1;
    long failed = start_keeper(kvm, options, &calls);
    if (failed < 0) {
        set_end(end, fl_kvm_broken, fl_kvm_at_start, -failed);
        release(kvm);
        return 0;
    }
    fl_frame frame;
    int64_t start = fl_milliseconds();
    int heard = 0;
    while (!heard && fl_milliseconds() - start < keeper_milliseconds) heard = hear(kvm, &frame, 100);
    set_end(end, fl_kvm_broken, fl_kvm_at_start, ESRCH);
    if (heard > 0) set_end(end, frame.kind, frame.reason, frame.status);
    if (end->kind == fl_kvm_ready) return kvm;
    await_keeper(kvm);
    release(kvm);
    return 0;
}

void fl_kvm_stop(fl_kvm *kvm) {
    fl_plain(SYS_shutdown, (uint64_t)kvm->talk, SHUT_RDWR, 0, 0, 0, 0);
    await_keeper(kvm);
    release(kvm);
}

// MARK: Scripts

void fl_kvm_begin(fl_kvm *kvm, fl_kvm_place place, uint64_t forced, int32_t error, fl_kvm_end *end) {
    kvm->shared->place = place;
    kvm->shared->worker_calls.forced = forced;
    kvm->shared->worker_calls.error = error;
    command(kvm, fl_frame_begin, end);
}

void fl_kvm_finish(fl_kvm *kvm, fl_kvm_end *end) { command(kvm, fl_frame_finish, end); }

/// Ends the script after something that ended a batch.
static void give_up(fl_kvm *kvm, fl_kvm_end *end) {
    end->step = atomic_load(&kvm->shared->current);
    fl_kvm_end finished;
    fl_kvm_finish(kvm, &finished);
    if (finished.kind != fl_kvm_ready) end->kind = finished.kind;
}

/// Whether the process that makes the current call is there no more.
static int is_gone(const fl_shared *all) {
    uint32_t step = atomic_load(&all->current);
    if (step >= all->count) return 0;
    int number = atomic_load(&all->processes[all->calls[step].process]);
    return number && fl_plain(SYS_kill, (uint64_t)number, 0, 0, 0, 0, 0) == -ESRCH;
}

void fl_kvm_run(fl_kvm *kvm, uint32_t count, int milliseconds, fl_kvm_end *end) {
    fl_shared *all = kvm->shared;
    all->count = count;
    all->words = 0;
    atomic_store(&all->current, 0);
    fl_set_word(&all->turn, 0);
    int slice = milliseconds < 100 ? milliseconds : 100;
    uint32_t seen = 0;
    int64_t since = fl_milliseconds();
    for (;;) {
        fl_frame frame;
        int heard = hear(kvm, &frame, slice);
        if (heard < 0) {
            set_end(end, fl_kvm_broken, fl_kvm_at_worker, ESRCH);
            end->step = atomic_load(&all->current);
            return;
        }
        if (heard && frame.script == kvm->script && (frame.kind == fl_kvm_done || frame.kind == fl_kvm_died)) {
            set_end(end, frame.kind, 0, frame.status);
            end->step = frame.step;
            if (frame.kind == fl_kvm_died) give_up(kvm, end);
            return;
        }
        if (heard) continue;
        uint32_t current = atomic_load(&all->current);
        int64_t now = fl_milliseconds();
        if (current != seen) {
            seen = current;
            since = now;
        } else if (now - since >= milliseconds || (current < count && is_gone(all))) {
            set_end(end, now - since >= milliseconds ? fl_kvm_hung : fl_kvm_died, 0, -1);
            give_up(kvm, end);
            return;
        }
    }
}

#else

// The guest's programs are x86's.
fl_kvm *fl_kvm_start(const fl_kvm_options *options, fl_kvm_end *end) {
    (void)options;
    *end = (fl_kvm_end){.kind = fl_kvm_broken, .reason = fl_kvm_at_start, .status = ENOSYS};
    return 0;
}

void fl_kvm_stop(fl_kvm *kvm) { (void)kvm; }

void fl_kvm_begin(fl_kvm *kvm, fl_kvm_place place, uint64_t forced, int32_t error, fl_kvm_end *end) {
    (void)kvm, (void)place, (void)forced, (void)error, (void)end;
}

void fl_kvm_finish(fl_kvm *kvm, fl_kvm_end *end) { (void)kvm, (void)end; }

void fl_kvm_run(fl_kvm *kvm, uint32_t count, int milliseconds, fl_kvm_end *end) {
    (void)kvm, (void)count, (void)milliseconds, (void)end;
}

#endif

fl_kvm_call *fl_kvm_calls(fl_kvm *kvm) { return kvm->shared->calls; }
uint64_t *fl_kvm_input(fl_kvm *kvm) { return kvm->shared->input; }
const fl_kvm_answer *fl_kvm_answers(const fl_kvm *kvm) { return kvm->shared->answers; }
const uint64_t *fl_kvm_output(const fl_kvm *kvm) { return kvm->shared->output; }
uint64_t fl_kvm_calls_made(const fl_kvm *kvm) { return kvm->shared->worker_calls.made; }
uint64_t fl_kvm_keeper_calls_made(const fl_kvm *kvm) { return kvm->shared->keeper_calls.made; }
uint64_t fl_kvm_refused_pages(const fl_kvm *kvm) { return kvm->shared->refused_pages; }
uint32_t fl_kvm_guest_width(const fl_kvm *kvm) { return kvm->shared->guest_width; }
const char *fl_kvm_instance(const fl_kvm *kvm) { return kvm->shared->instance; }
int32_t fl_kvm_keeper(const fl_kvm *kvm) { return atomic_load(&kvm->shared->keeper); }
int32_t fl_kvm_worker(const fl_kvm *kvm) { return atomic_load(&kvm->shared->worker); }
