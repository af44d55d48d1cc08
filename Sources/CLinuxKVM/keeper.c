#define _GNU_SOURCE
#include "shared.h"

#if defined(__linux__) && defined(__x86_64__)

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/// Descriptors of the keeper, and of each worker.
enum { talk_number = 3, child_number, life_number, own_life_number };
enum { stuck_milliseconds = 10000 };

static long make(fl_shared *all, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    return fl_call(&all->keeper_calls, number, a, b, c, d, 0, 0);
}

_Noreturn static void leave(void) {
    for (;;) fl_plain(SYS_exit_group, 0, 0, 0, 0, 0, 0);
}

static void tell(fl_shared *all, uint32_t kind, uint32_t reason, long status) {
    fl_frame frame = {.kind = kind, .script = all->script, .status = (int32_t)status, .reason = reason};
    frame.step = atomic_load(&all->current);
    fl_plain(SYS_sendto, talk_number, (uint64_t)&frame, sizeof frame, MSG_NOSIGNAL, 0, 0);
}

// MARK: Files of /proc

static long write_text(fl_shared *all, const char *path, const char *text) {
    long fd = make(all, SYS_open, (uint64_t)path, O_WRONLY | O_CLOEXEC, 0, 0);
    if (fd < 0) return fd;
    long done = make(all, SYS_write, (uint64_t)fd, (uint64_t)text, strlen(text), 0);
    fl_plain(SYS_close, (uint64_t)fd, 0, 0, 0, 0, 0);
    return done;
}

/// The digits of a number in hexadecimal, or -1.
static int digit(char letter) {
    if (letter >= '0' && letter <= '9') return letter - '0';
    return letter >= 'a' && letter <= 'f' ? letter - 'a' + 10 : -1;
}

/// Takes note of one mapping of the keeper, which the workers have as well. -EEXIST: it lies where regions lie.
static long note_mapping(fl_shared *all, uint64_t first, uint64_t end) {
    if (first < FL_KVM_ARENA_END && end > FL_KVM_ARENA) return -EEXIST;
    if (end <= FL_KVM_ARENA && end > all->own_below) all->own_below = end;
    if (first >= FL_KVM_ARENA_END && first < all->own_low) all->own_low = first;
    return 0;
}

/// Where the processes' own memory is. Kernel: /proc/PID/maps, `first-end` in hexadecimal at the beginning of a line.
static long note_mappings(fl_shared *all) {
    char text[4096];
    uint64_t bounds[2] = {0, 0};
    int field = 0;
    all->own_low = UINT64_C(1) << 47;
    all->own_below = 0;
    long fd = make(all, SYS_open, (uint64_t)"/proc/self/maps", O_RDONLY | O_CLOEXEC, 0, 0);
    if (fd < 0) return fd;
    long got = 0, failed = 0;
    while (!failed && (got = make(all, SYS_read, (uint64_t)fd, (uint64_t)text, sizeof text, 0)) > 0) {
        for (long i = 0; i < got; i++) {
            int value = field < 2 ? digit(text[i]) : -1;
            if (value >= 0) {
                bounds[field] = bounds[field] << 4 | (uint64_t)value;
            } else if (text[i] == '\n') {
                // The page of old system calls lies beyond all that a process has.
                if (!failed && bounds[0] >> 47 == 0) failed = note_mapping(all, bounds[0], bounds[1]);
                field = 0;
                bounds[0] = bounds[1] = 0;
            } else {
                field++;
            }
        }
    }
    fl_plain(SYS_close, (uint64_t)fd, 0, 0, 0, 0, 0);
    // What is mapped later goes below what is there now.
    const uint64_t later = UINT64_C(1) << 40;
    all->own_low = all->own_low > FL_KVM_ARENA_END + later ? all->own_low - later : FL_KVM_ARENA_END;
    return failed ? failed : got;
}

// MARK: The beginning

/// What asks a program to end is for the one who asks: when that has ended, so do the others.
static void ignore_requests(void) {
    const int ignored[] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE};
    for (int i = 0; i < 4; i++) signal(ignored[i], SIG_IGN);
}

/// The socket where it belongs, which is free or another program's.
static void place_socket(int talk) {
    if (talk == talk_number) return;
    fl_plain(SYS_dup2, (uint64_t)talk, talk_number, 0, 0, 0, 0);
    fl_plain(SYS_close, (uint64_t)talk, 0, 0, 0, 0, 0);
}

/// The socket, what tells of children, and a pipe that tells them of the keeper; nothing that another program waits for.
static long tidy_descriptors(fl_shared *all) {
    long failed = make(all, SYS_close_range, talk_number + 1, UINT32_MAX, 0, 0);
    if (failed < 0) return failed;
    long null = make(all, SYS_open, (uint64_t)"/dev/null", O_RDWR, 0, 0);
    if (null < 0) return null;
    for (uint64_t number = 0; number < talk_number; number++) {
        failed = make(all, SYS_dup2, (uint64_t)null, number, 0, 0);
        if (failed < 0) return failed;
    }
    if (null > talk_number) make(all, SYS_close, (uint64_t)null, 0, 0, 0);
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, 0);
    failed = make(all, SYS_signalfd4, UINT64_MAX, (uint64_t)&child, sizeof(uint64_t), SFD_CLOEXEC | SFD_NONBLOCK);
    if (failed < 0) return failed;
    int ends[2];
    return make(all, SYS_pipe2, (uint64_t)ends, O_CLOEXEC, 0, 0);
}

/// Pages of private memory that a process begins with; minus an errno. Kernel: the sixth number of /proc/PID/statm.
static long private_pages(fl_shared *all) {
    char text[256];
    long fd = make(all, SYS_open, (uint64_t)"/proc/self/statm", O_RDONLY | O_CLOEXEC, 0, 0);
    if (fd < 0) return fd;
    long got = make(all, SYS_read, (uint64_t)fd, (uint64_t)text, sizeof text, 0), pages = 0;
    fl_plain(SYS_close, (uint64_t)fd, 0, 0, 0, 0, 0);
    int spaces = 0;
    for (long i = 0; i < got && spaces < 6; i++) {
        if (text[i] == ' ') spaces++;
        else if (spaces == 5) pages = pages * 10 + (text[i] - '0');
    }
    return got < 0 ? got : pages;
}

/// What every process is allowed. Of private memory alone: a limit of all that is mapped would have calls on shared memory
/// fail another way than the lack of memory does.
static long limit(fl_shared *all) {
    long pages = private_pages(all);
    if (pages < 0) return pages;
    uint64_t bytes = all->options.private_memory + (uint64_t)pages * fl_page;
    struct rlimit none = {0, 0}, data = {bytes, bytes};
    // Who uses too much memory is ended first. Best effort, as the next is.
    write_text(all, "/proc/self/oom_score_adj", "1000");
    make(all, SYS_prlimit64, 0, RLIMIT_CORE, (uint64_t)&none, 0);
    if (all->group[0]) {
        // 0: the process that writes.
        long failed = write_text(all, all->group, "0");
        if (failed < 0) return failed;
    }
    return make(all, SYS_prlimit64, 0, RLIMIT_DATA, (uint64_t)&data, 0);
}

static long ask_device(fl_shared *all, uint32_t request, uint64_t argument) {
    return make(all, SYS_ioctl, (uint64_t)all->device, request, argument, 0);
}

/// Opens the device and learns what a guest may be. 0, or what failed.
static uint32_t open_device(fl_shared *all, long *error) {
    const char *path = all->options.device ? all->options.device : "/dev/kvm";
    *error = make(all, SYS_open, (uint64_t)path, O_RDWR | O_CLOEXEC, 0, 0);
    if (*error < 0) return fl_kvm_at_device;
    all->device = (int)*error;
    *error = ask_device(all, KVM_GET_API_VERSION, 0);
    if (*error != 12) return fl_kvm_at_version;
    const int needed[] = {KVM_CAP_USER_MEMORY, KVM_CAP_IMMEDIATE_EXIT};
    for (int i = 0; i < 2; i++) {
        *error = ask_device(all, KVM_CHECK_EXTENSION, (uint64_t)needed[i]);
        if (*error <= 0) return fl_kvm_at_capability;
    }
    all->cpuid.head.nent = fl_most_cpuid;
    *error = ask_device(all, KVM_GET_SUPPORTED_CPUID, (uint64_t)&all->cpuid);
    if (*error < 0) return fl_kvm_at_capability;
    all->guest_width = 36;
    for (uint32_t i = 0; i < all->cpuid.head.nent; i++)
        // Bits of a physical address, in the lowest byte.
        if (all->cpuid.entries[i].function == 0x80000008) all->guest_width = all->cpuid.entries[i].eax & 0xff;
    return 0;
}

static uint32_t prepare(fl_shared *all, long *error) {
    if ((*error = tidy_descriptors(all)) < 0) return fl_kvm_at_start;
    // A terminal's signals are for the one who asks; its end is told by the socket.
    make(all, SYS_setpgid, 0, 0, 0, 0);
    // As in the model there are none, not even by request.
    if (!all->options.huge_pages) make(all, SYS_prctl, PR_SET_THP_DISABLE, 1, 0, 0);
    // Whoever loses its parent becomes the keeper's child, so that nobody is left over.
    if ((*error = make(all, SYS_prctl, PR_SET_CHILD_SUBREAPER, 1, 0, 0)) < 0) return fl_kvm_at_start;
    uint32_t failed = open_device(all, error);
    if (failed) return failed;
    if ((*error = note_mappings(all)) < 0) return *error == -EEXIST ? fl_kvm_at_arena : fl_kvm_at_start;
    if ((*error = limit(all)) < 0) return fl_kvm_at_limits;
    return all->options.records ? fl_trace_open(all, error) : 0;
}

// MARK: Workers

/// Takes what has ended. Whether a child is left; if the worker has ended, `status` is its own.
static int reap(fl_shared *all, int *status) {
    for (;;) {
        int ended = 0;
        long pid = fl_plain(SYS_wait4, UINT64_MAX, (uint64_t)&ended, WNOHANG | __WALL, 0, 0, 0);
        if (pid <= 0) return pid == 0;
        if (pid == atomic_load(&all->worker)) {
            *status = ended;
            atomic_store(&all->worker, 0);
        }
    }
}

/// Ends all processes of the script. 0, or that one can't be ended.
static uint32_t end_script(fl_shared *all, int group) {
    int status;
    int64_t start = fl_milliseconds();
    while (reap(all, &status)) {
        // A child is left, so the group is still the script's; 0 would be the keeper's own, 1 everybody's.
        if (group > 1) fl_plain(SYS_kill, (uint64_t)-(int64_t)group, SIGKILL, 0, 0, 0, 0);
        struct pollfd ended = {.fd = child_number, .events = POLLIN};
        fl_plain(SYS_poll, (uint64_t)&ended, 1, 100, 0, 0, 0);
        char info[128];
        fl_plain(SYS_read, child_number, (uint64_t)info, sizeof info, 0, 0, 0);
        if (fl_milliseconds() - start > stuck_milliseconds) return fl_kvm_stuck;
    }
    return fl_kvm_ready;
}

_Noreturn static void become_worker(fl_shared *all) {
    static fl_worker worker;
    fl_plain(SYS_setpgid, 0, 0, 0, 0, 0, 0);
    fl_plain(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0, 0);
    struct rlimit time = {all->options.processor_seconds, all->options.processor_seconds};
    fl_plain(SYS_prlimit64, 0, RLIMIT_CPU, (uint64_t)&time, 0, 0, 0);
    fl_reset_signals();
    fl_catch_signals();
    ignore_requests();
    worker.all = all;
    worker.talk = talk_number;
    worker.life = life_number;
    fl_plain(SYS_close, own_life_number, 0, 0, 0, 0, 0);
    int number = (int)fl_plain(SYS_getpid, 0, 0, 0, 0, 0, 0);
    atomic_store(&all->worker, number);
    atomic_store(&all->processes[0], number);
    fl_serve(&worker);
}

/// Nothing that a script has made.
static void forget_script(fl_shared *all) {
    for (int i = 0; i < fl_kvm_most; i++) {
        all->vms[i] = (fl_vm){.fd = -1};
        all->regions[i] = (fl_region){.fd = -1};
        all->memfds[i] = -1;
    }
    for (int i = 0; i < fl_kvm_most_cpus; i++) all->cpus[i] = (fl_cpu){.fd = -1};
    for (int i = 0; i <= fl_kvm_most; i++) atomic_store(&all->processes[i], 0);
    all->slot_count = 0;
    all->leaving = 0;
    all->worker_calls.made = 0;
    all->calls_done = 0;
    atomic_store(&all->turn, nobody);
}

/// Starts a worker: its number, or minus an errno.
static long begin_script(fl_shared *all) {
    forget_script(all);
    long pid = fl_trace_begin(all);
    if (pid >= 0) pid = make(all, SYS_clone, SIGCHLD, 0, 0, 0);
    if (pid == 0) become_worker(all);
    if (pid < 0) return pid;
    fl_plain(SYS_setpgid, (uint64_t)pid, (uint64_t)pid, 0, 0, 0, 0);
    atomic_store(&all->worker, (int)pid);
    return pid;
}

// MARK: The keeper

/// Does what a message says. Whether there will be others.
static int obey(fl_shared *all, int *group) {
    fl_frame frame;
    long got = fl_plain(SYS_recvfrom, talk_number, (uint64_t)&frame, sizeof frame, 0, 0, 0);
    if (got == -EINTR) return 1;
    if (got != sizeof frame) return 0;
    uint32_t ended = end_script(all, *group);
    if (ended != fl_kvm_ready) {
        tell(all, ended, 0, 0);
        return 0;
    }
    all->script = frame.script;
    fl_trace_end(all);
    long worker = frame.kind == fl_frame_begin ? begin_script(all) : 0;
    if (worker > 0) *group = (int)worker;
    tell(all, worker < 0 ? fl_kvm_broken : fl_kvm_ready, fl_kvm_at_worker, worker < 0 ? -worker : 0);
    return 1;
}

void fl_keep(fl_shared *all, int talk) {
    fl_reset_signals();
    ignore_requests();
    place_socket(talk);
    long error = 0;
    uint32_t failed = prepare(all, &error);
    atomic_store(&all->keeper, (int)fl_plain(SYS_getpid, 0, 0, 0, 0, 0, 0));
    tell(all, failed ? fl_kvm_broken : fl_kvm_ready, failed, error < 0 ? -error : failed ? error : 0);
    if (failed) {
        fl_trace_close(all);
        leave();
    }
    int group = 0, status = 0;
    for (;;) {
        struct pollfd waits[2] = {{.fd = talk_number, .events = POLLIN}, {.fd = child_number, .events = POLLIN}};
        fl_plain(SYS_poll, (uint64_t)waits, 2, UINT64_MAX, 0, 0, 0);
        if (waits[1].revents) {
            char info[128];
            fl_plain(SYS_read, child_number, (uint64_t)info, sizeof info, 0, 0, 0);
            int had = atomic_load(&all->worker);
            reap(all, &status);
            if (had && !atomic_load(&all->worker)) tell(all, fl_kvm_died, 0, status);
        }
        if (waits[0].revents && !obey(all, &group)) break;
    }
    end_script(all, group);
    fl_trace_close(all);
    leave();
}

#endif
