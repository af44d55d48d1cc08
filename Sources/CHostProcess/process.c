#define _GNU_SOURCE
#include "CHostProcess.h"
#include "CSystemCalls.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { idle, asked, answered };

typedef struct channel {
    _Atomic int state;
    _Atomic int pid;  ///< of a process that serves it; 0: none
    fl_host_call call;
    fl_host_answer answer;
} channel;

typedef struct shared {
    channel keeper;
    _Atomic int ending;
    pid_t owner;  ///< the process that asks
    _Atomic int has_swap;
    _Atomic int has_secret;
    channel processes[fl_host_processes];
} shared;

struct fl_host {
    shared *shared;
    pid_t keeper;
    int files[fl_host_files + 1];
    int pagemaps[fl_host_processes];
    cpu_set_t processors;  ///< of the calling thread, before
};

static void set_state(channel *c, int state) { fl_set_word(&c->state, state); }

/// Waits until the state is `wanted`. 0, or ETIMEDOUT after `seconds` or a little more.
static int await_state(channel *c, int wanted, int seconds) {
    return fl_await_word(&c->state, wanted, (seconds + 1) * 1000 - 1);
}

// MARK: In the processes

static void access_memory(const fl_host_call *call, fl_host_answer *answer) {
    int stores = call->operation == fl_host_store;
    uint64_t value = stores ? call->value : 0;
    answer->signal = fl_access(call->address, call->argument, stores, &value);
    if (!stores && !answer->signal) answer->value = value;
}

static void serve(shared *all, int number, const int *files);

static void fork_process(shared *all, int child, const int *files, fl_host_answer *answer) {
    channel *c = &all->processes[child];
    atomic_store(&c->state, idle);
    pid_t pid = fork();
    if (pid < 0) {
        answer->error = errno;
    } else if (pid == 0) {
        serve(all, child, files);
    } else {
        atomic_store(&c->pid, pid);
        answer->value = (uint64_t)pid;
    }
}

/// The kernel keeps pages whose age changes in batches, one for each processor, with a reference on each until it empties
/// them; meanwhile a write copies such a page that it would keep otherwise. Every advice about age empties them first.
static void empty_batches(void) {
    static char page[4096] __attribute__((aligned(4096)));
    madvise(page, sizeof page, MADV_COLD);
}

static void perform(shared *all, const int *files, const fl_host_call *call, fl_host_answer *answer) {
    void *address = (void *)call->address;
    memset(answer, 0, sizeof *answer);
    switch (call->operation) {
    case fl_host_map:
        // Not by the C library's functions, which judge some arguments themselves.
        if (syscall(
                SYS_mmap, call->address, call->length, call->argument, call->value,
                call->file < 0 ? -1l : (long)files[call->file], call->offset) == -1)
            answer->error = errno;
        return;
    case fl_host_unmap:
        if (munmap(address, call->length)) answer->error = errno;
        return;
    case fl_host_protect:
        if (syscall(SYS_mprotect, call->address, call->length, call->argument)) answer->error = errno;
        return;
    case fl_host_advise:
        if (madvise(address, call->length, (int)call->argument)) answer->error = errno;
        empty_batches();
        return;
    case fl_host_remap:
        if (syscall(SYS_mremap, call->address, call->length, call->value, call->flags, call->offset) == -1)
            answer->error = errno;
        return;
    case fl_host_load:
    case fl_host_store: access_memory(call, answer); return;
    case fl_host_fork: fork_process(all, (int)call->argument, files, answer); return;
    }
    answer->error = ENOSYS;
}

/// Never returns.
static void serve(shared *all, int number, const int *files) {
    fl_catch_signals();
    channel *c = &all->processes[number];
    for (;;) {
        // Not by PR_SET_PDEATHSIG: a process may outlive the one that forked it.
        while (await_state(c, asked, 1))
            if (kill(atomic_load(&all->keeper.pid), 0)) _exit(0);
        perform(all, files, &c->call, &c->answer);
        set_state(c, answered);
    }
}

// MARK: Swap

static int write_text(const char *path, const char *text) {
    int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file < 0) return -1;
    ssize_t done = write(file, text, strlen(text));
    close(file);
    return done == (ssize_t)strlen(text) ? 0 : -1;
}

static int swap_is_active(void) {
    FILE *file = fopen("/proc/swaps", "re");
    if (!file) return 1;
    char line[256];
    int lines = 0;
    while (fgets(line, sizeof line, file)) lines++;
    fclose(file);
    return lines > 1;
}

enum { swap_bytes = 64 << 20 };

/// The header that makes a device a swap device: version 1, the last page, and a signature at the end of the first page.
static int write_swap_header(const char *device) {
    static char header[4096];
    memset(header, 0, sizeof header);
    uint32_t version = 1, last = swap_bytes / 4096 - 1;
    memcpy(header + 1024, &version, 4);
    memcpy(header + 1028, &last, 4);
    memcpy(header + 4086, "SWAPSPACE2", 10);
    for (int i = 0; i < 100; i++) {
        int file = open(device, O_RDWR | O_CLOEXEC);
        if (file >= 0) {
            ssize_t done = write(file, header, sizeof header);
            int failed = fsync(file);
            close(file);
            return done == sizeof header && !failed ? 0 : -1;
        }
        usleep(10000);
    }
    return -1;
}

/// Removes the compressed memory `number`; -1: none.
static void swap_stop(int number) {
    if (number < 0) return;
    char path[64], text[16];
    snprintf(path, sizeof path, "/dev/zram%d", number);
    swapoff(path);
    snprintf(path, sizeof path, "/sys/block/zram%d/reset", number);
    write_text(path, "1");
    snprintf(text, sizeof text, "%d", number);
    write_text("/sys/class/zram-control/hot_remove", text);
}

/// Makes compressed memory of its own and swaps to it. Its number; -1: there is none; -2: somebody else's is active.
static int swap_start(void) {
    if (swap_is_active()) return -2;
    if (geteuid() != 0) return -1;
    FILE *control = fopen("/sys/class/zram-control/hot_add", "re");
    if (!control) return -1;
    int number = -1;
    int found = fscanf(control, "%d", &number);
    fclose(control);
    if (found != 1) return -1;
    char path[64], text[32];
    snprintf(path, sizeof path, "/sys/block/zram%d/disksize", number);
    snprintf(text, sizeof text, "%d", swap_bytes);
    int ready = write_text(path, text) == 0;
    snprintf(path, sizeof path, "/dev/zram%d", number);
    if (ready && write_swap_header(path) == 0 && swapon(path, 0) == 0) return number;
    swap_stop(number);
    return -1;
}

static void end_all(shared *all) {
    for (int i = 0; i < fl_host_processes; i++) {
        int pid = atomic_exchange(&all->processes[i].pid, 0);
        if (pid > 0) kill(pid, SIGKILL);
    }
}

// MARK: The keeper

/// Secret memory of zeros; its size can be given once only. -1: there is none here.
static int secret_start(void) {
    int file = (int)syscall(447 /* memfd_secret */, 0);
    if (file >= 0 && ftruncate(file, fl_host_secret_pages * 4096)) {
        close(file);
        return -1;
    }
    return file;
}

/// The keeper: small, so that what it forks is made fast. Never returns.
static void keep(shared *all, int *files) {
    // What ends the owner, whatever it is, must leave this one the time to clean up.
    signal(SIGINT, SIG_IGN);
    signal(SIGTERM, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
    // Huge pages come by request only.
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
    // Whoever loses its parent becomes this one's child, so that nobody is left over.
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    int swap = swap_start();
    atomic_store(&all->has_swap, swap >= 0 ? 1 : swap == -1 ? 0 : -1);
    files[fl_host_secret] = secret_start();
    atomic_store(&all->has_secret, files[fl_host_secret] >= 0);
    // And what ends is gone at once, its memory before it.
    signal(SIGCHLD, SIG_IGN);
    channel *c = &all->keeper;
    set_state(c, answered);
    // Not by PR_SET_PDEATHSIG, which tells of the thread that started this, not of its process.
    while (!atomic_load(&all->ending) && getppid() == all->owner) {
        if (await_state(c, asked, 0)) continue;
        if (atomic_load(&all->ending)) break;
        end_all(all);
        while (waitpid(-1, 0, 0) > 0) {}
        memset(&c->answer, 0, sizeof c->answer);
        if (files[fl_host_secret] >= 0) close(files[fl_host_secret]);
        files[fl_host_secret] = secret_start();
        fork_process(all, 0, files, &c->answer);
        set_state(c, answered);
    }
    end_all(all);
    while (waitpid(-1, 0, 0) > 0) {}
    swap_stop(swap);
    _exit(0);
}

// MARK: In the process that asks

fl_host *fl_host_start(void) {
    fl_host *host = calloc(1, sizeof *host);
    if (!host) return 0;
    for (int i = 0; i < fl_host_processes; i++) host->pagemaps[i] = -1;
    host->shared = mmap(0, sizeof *host->shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (host->shared == MAP_FAILED) {
        free(host);
        return 0;
    }
    for (int i = 0; i < fl_host_files; i++) {
        host->files[i] = memfd_create("faultline", MFD_CLOEXEC);
        if (host->files[i] < 0) return 0;
    }
    sched_getaffinity(0, sizeof host->processors, &host->processors);
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    sched_setaffinity(0, sizeof one, &one);
    host->files[fl_host_secret] = -1;
    host->shared->owner = getpid();
    host->keeper = fork();
    if (host->keeper < 0) return 0;
    if (host->keeper == 0) {
        atomic_store(&host->shared->keeper.pid, getpid());
        keep(host->shared, host->files);
    }
    if (await_state(&host->shared->keeper, answered, 20)) return 0;
    return host;
}

int fl_host_has_swap(const fl_host *host) { return atomic_load(&host->shared->has_swap); }

int fl_host_has_secret(const fl_host *host) { return atomic_load(&host->shared->has_secret); }

static void forget(fl_host *host, int process) {
    if (host->pagemaps[process] >= 0) close(host->pagemaps[process]);
    host->pagemaps[process] = -1;
}

void fl_host_stop(fl_host *host) {
    for (int i = 0; i < fl_host_processes; i++) forget(host, i);
    atomic_store(&host->shared->ending, 1);
    set_state(&host->shared->keeper, asked);
    waitpid(host->keeper, 0, 0);
    sched_setaffinity(0, sizeof host->processors, &host->processors);
    for (int i = 0; i < fl_host_files; i++) close(host->files[i]);
    munmap(host->shared, sizeof *host->shared);
    free(host);
}

static int converse(fl_host *host, channel *c) {
    set_state(c, asked);
    int failed = await_state(c, answered, 20);
    (void)host;
    if (failed) return failed;
    atomic_store(&c->state, idle);
    return 0;
}

int fl_host_begin(fl_host *host) {
    for (int i = 0; i < fl_host_processes; i++) forget(host, i);
    for (int i = 0; i < fl_host_files; i++)
        if (ftruncate(host->files[i], 0)) return errno;
    int failed = converse(host, &host->shared->keeper);
    return failed ? failed : host->shared->keeper.answer.error;
}

int fl_host_do(fl_host *host, int process, const fl_host_call *call, fl_host_answer *answer) {
    channel *c = &host->shared->processes[process];
    if (atomic_load(&c->pid) <= 0) return ESRCH;
    c->call = *call;
    int failed = converse(host, c);
    if (failed) return failed;
    *answer = c->answer;
    return 0;
}

void fl_host_end(fl_host *host, int process) {
    forget(host, process);
    int pid = atomic_exchange(&host->shared->processes[process].pid, 0);
    if (pid <= 0) return;
    kill(pid, SIGKILL);
    // Nobody waits for it, so it is gone when its memory is.
    struct timespec pause = {.tv_nsec = 20000};
    while (kill(pid, 0) == 0) nanosleep(&pause, 0);
}

int fl_host_pagemap(fl_host *host, int process, uint64_t entries[fl_host_pages]) {
    int pid = atomic_load(&host->shared->processes[process].pid);
    if (pid <= 0) return ESRCH;
    if (host->pagemaps[process] < 0) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/pagemap", pid);
        host->pagemaps[process] = open(path, O_RDONLY | O_CLOEXEC);
        if (host->pagemaps[process] < 0) return errno;
    }
    size_t wanted = fl_host_pages * sizeof *entries;
    ssize_t got = pread(host->pagemaps[process], entries, wanted, (off_t)(FL_HOST_BASE / 4096 * 8));
    if (got < 0) return errno;
    return (size_t)got == wanted ? 0 : EIO;
}

/// The bits of a line "VmFlags: rd wr ...".
static uint16_t area_bits(const char *words) {
    static const struct {
        char word[4];
        uint16_t bit;
    } known[] = {
        {"rd", fl_area_read}, {"wr", fl_area_write}, {"ex", fl_area_execute}, {"sh", fl_area_shared},
        {"ac", fl_area_accounted}, {"hg", fl_area_huge}, {"nh", fl_area_no_huge}, {"mg", fl_area_mergeable},
        {"gu", fl_area_guarded}, {"lo", fl_area_locked},
    };
    uint16_t bits = fl_area_mapped;
    for (; *words && words[1]; words++)
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            if (words[-1] == ' ' && words[0] == known[i].word[0] && words[1] == known[i].word[1])
                bits |= known[i].bit;
    return bits;
}

int fl_host_areas(fl_host *host, int process, uint16_t areas[fl_host_pages]) {
    int pid = atomic_load(&host->shared->processes[process].pid);
    if (pid <= 0) return ESRCH;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/smaps", pid);
    FILE *file = fopen(path, "re");
    if (!file) return errno;
    memset(areas, 0, fl_host_pages * sizeof *areas);
    char line[512];
    uint64_t low = 0, high = 0;
    const uint64_t end = FL_HOST_BASE + fl_host_pages * 4096ull;
    while (fgets(line, sizeof line, file)) {
        // A capital letter begins a line about the area, a number the next area.
        if (line[0] >= 'A' && line[0] <= 'Z') {
            if (high <= FL_HOST_BASE || low >= end || strncmp(line, "VmFlags:", 8)) continue;
            uint16_t bits = area_bits(line + 9);
            for (uint64_t address = low; address < high; address += 4096)
                if (address >= FL_HOST_BASE && address < end)
                    areas[(address - FL_HOST_BASE) / 4096] = bits | (address == low ? fl_area_first : 0);
        } else if (sscanf(line, "%lx-%lx", &low, &high) != 2 || low >= end) {
            break;
        }
    }
    fclose(file);
    return 0;
}

int fl_host_file(fl_host *host, int number) { return host->files[number]; }

int fl_host_truncate(fl_host *host, int number, uint64_t bytes) {
    return ftruncate(host->files[number], (off_t)bytes) ? errno : 0;
}

int fl_host_punch(fl_host *host, int number, uint64_t offset, uint64_t length) {
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    return fallocate(host->files[number], mode, (off_t)offset, (off_t)length) ? errno : 0;
}

int fl_host_read_file(fl_host *host, int number, uint64_t offset, int bytes, uint64_t *value) {
    *value = 0;
    ssize_t got = pread(host->files[number], value, (size_t)bytes, (off_t)offset);
    return got < 0 ? -errno : (int)got;
}

int fl_host_write_file(fl_host *host, int number, uint64_t offset, int bytes, uint64_t value) {
    ssize_t done = pwrite(host->files[number], &value, (size_t)bytes, (off_t)offset);
    return done < 0 ? -errno : (int)done;
}
