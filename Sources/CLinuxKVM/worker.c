#define _GNU_SOURCE
#include "shared.h"

#if defined(__linux__) && defined(__x86_64__)

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

long fl_make(fl_worker *w, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f) {
    return fl_call(&w->all->worker_calls, number, a, b, c, d, e, f);
}

long fl_ioctl(fl_worker *w, int fd, uint32_t request, void *argument) {
    return fl_make(w, SYS_ioctl, (uint64_t)(int64_t)fd, request, (uint64_t)argument, 0, 0, 0);
}

void fl_fail(fl_kvm_answer *answer, uint32_t impossible, long error) {
    answer->impossible = impossible;
    answer->error = (int32_t)-error;
}

void fl_answer(fl_kvm_answer *answer, long result) {
    answer->error = result < 0 ? (int32_t)-result : 0;
    answer->value = result < 0 ? -1 : result;
}

uint64_t *fl_take_words(fl_worker *w, fl_kvm_answer *answer, uint64_t words) {
    fl_shared *all = w->all;
    if (words > fl_kvm_output_words - all->words) {
        fl_fail(answer, fl_kvm_no_room, 0);
        return 0;
    }
    uint64_t *taken = all->output + all->words;
    memset(taken, 0, words * sizeof *taken);
    answer->first_word = (uint32_t)all->words;
    answer->words = (uint32_t)words;
    return taken;
}

long fl_map_pages(fl_worker *w, int fd, uint64_t bytes, uint64_t offset) {
    uint64_t kind = fd < 0 && offset == UINT64_MAX ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    long at = fl_make(
        w, SYS_mmap, 0, bytes, PROT_READ | PROT_WRITE, kind, (uint64_t)(int64_t)fd, kind & MAP_ANONYMOUS ? 0 : offset);
    if (at < 0 && at > -fl_page) return at;
    long failed = fl_make(w, SYS_madvise, (uint64_t)at, bytes, MADV_DONTFORK, 0, 0, 0);
    if (failed >= 0) return at;
    fl_plain(SYS_munmap, (uint64_t)at, bytes, 0, 0, 0, 0);
    return failed;
}

void fl_forget_mappings(fl_worker *w) {
    memset(w->runs, 0, sizeof w->runs);
    memset(w->rings, 0, sizeof w->rings);
    w->own_memory = 0;
    w->own_age = 0;
}

// MARK: Processes of a script

static void fork_process(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    // Its own memory, and the descriptors of all.
    long pid = fl_make(w, SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0, 0);
    fl_answer(answer, pid);
    if (pid < 0) return;
    if (pid == 0) {
        w->process = (uint32_t)call->subject;
        fl_forget_mappings(w);
        fl_forget_pipe();
        fl_serve(w);
    }
    answer->value = 0;
    atomic_store(&w->all->processes[call->subject], (int)pid);
}

/// A process that has ended is gone with its memory before the next call.
static void await_leaving(fl_shared *all) {
    struct timespec pause = {.tv_nsec = 20000};
    while (all->leaving && fl_plain(SYS_kill, (uint64_t)all->leaving, 0, 0, 0, 0, 0) == 0)
        fl_plain(SYS_nanosleep, (uint64_t)&pause, 0, 0, 0, 0, 0);
    all->leaving = 0;
}

// MARK: Calls

static void perform(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    switch (call->operation) {
    case fl_kvm_fork: fork_process(w, call, answer); return;
    case fl_kvm_exit: fl_drain(); return;
    case fl_kvm_guest: fl_guest_step(w, call, answer); return;
    }
    if (call->operation <= fl_kvm_store)
        fl_host_step(w, call, answer);
    else
        fl_kvm_step(w, call, answer);
}

/// What is empty, before a call: no exit, nothing returned.
static fl_kvm_answer empty_answer(const fl_shared *all) {
    fl_kvm_answer answer;
    memset(&answer, 0, sizeof answer);
    answer.exit = -1;
    answer.calls_before = all->worker_calls.made;
    return answer;
}

static void end_batch(fl_worker *w) {
    fl_shared *all = w->all;
    fl_frame frame = {.kind = fl_kvm_done, .script = all->script, .step = atomic_load(&all->current)};
    atomic_store(&all->turn, nobody);
    fl_plain(SYS_sendto, (uint64_t)w->talk, (uint64_t)&frame, sizeof frame, MSG_NOSIGNAL, 0, 0);
}

/// Makes the calls that are this process's to make, one after another, until it is another's turn. Whether it has ended.
static int work(fl_worker *w) {
    fl_shared *all = w->all;
    int ended = 0;
    for (;;) {
        uint32_t step = atomic_load(&all->current);
        if (step >= all->count) {
            end_batch(w);
            return ended;
        }
        const fl_kvm_call *call = &all->calls[step];
        fl_kvm_answer answer = empty_answer(all);
        if (atomic_load(&all->processes[call->process]) == 0) {
            fl_fail(&answer, fl_kvm_no_process, 0);
        } else if (call->process != w->process) {
            fl_set_word(&all->turn, (int)call->process);
            return ended;
        } else {
            fl_mark(all, "");
            perform(w, call, &answer);
            fl_mark(all, " done");
            if (answer.impossible == fl_kvm_no_room && all->words > 0) {
                // There is room in the next batch.
                all->count = step;
                continue;
            }
            all->words += answer.words;
        }
        all->answers[step] = answer;
        if (call->operation == fl_kvm_exit && answer.impossible == fl_kvm_possible) {
            ended = 1;
            all->leaving = atomic_exchange(&all->processes[w->process], 0);
        }
        all->calls_done++;
        atomic_store(&all->current, step + 1);
    }
}

/// Whether the keeper is gone. PR_SET_PDEATHSIG would not tell: a process may outlive the one that forked it.
static int is_forsaken(const fl_worker *w) {
    struct pollfd end = {.fd = w->life};
    return fl_plain(SYS_poll, (uint64_t)&end, 1, 0, 0, 0, 0) > 0 && end.revents & POLLHUP;
}

void fl_serve(fl_worker *w) {
    fl_shared *all = w->all;
    for (;;) {
        if (fl_await_word(&all->turn, (int)w->process, 1000)) {
            if (is_forsaken(w)) break;
            continue;
        }
        await_leaving(all);
        if (work(w)) break;
    }
    for (;;) fl_plain(SYS_exit_group, 0, 0, 0, 0, 0, 0);
}

#endif
