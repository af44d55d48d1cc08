#define _GNU_SOURCE
#include "shared.h"

#if defined(__linux__) && defined(__x86_64__)

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/syscall.h>

// A private instance of tracefs, in a mount namespace of the keeper's own: no other process sees the mount, which ends with
// the keeper. The instance is removed when the keeper leaves; one whose keeper was killed, by the one who asked, or if that is
// gone as well, by the next keeper.

#define TRACEFS "/sys/kernel/tracing"
#define INSTANCES TRACEFS "/instances"
#define PREFIX "faultline-"

static long make(fl_shared *all, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e) {
    return fl_call(&all->keeper_calls, number, a, b, c, d, e, 0);
}

/// Appends; what does not fit is cut off.
static void append(char *text, const char *more) {
    size_t length = strlen(text), count = strlen(more);
    if (count > fl_most_path - 1 - length) count = fl_most_path - 1 - length;
    memcpy(text + length, more, count);
    text[length + count] = 0;
}

static void append_number(char *text, uint64_t number) {
    char digits[24];
    int first = sizeof digits - 1;
    digits[first] = 0;
    do digits[--first] = (char)('0' + number % 10);
    while (number /= 10);
    append(text, digits + first);
}

/// A file of the instance, or the instance itself.
static const char *path_in(const fl_shared *all, const char *name, char *path) {
    path[0] = 0;
    append(path, INSTANCES "/");
    append(path, all->instance);
    append(path, name);
    return path;
}

static long write_file(fl_shared *all, const char *name, const char *text) {
    char path[fl_most_path];
    long fd = make(all, SYS_open, (uint64_t)path_in(all, name, path), O_WRONLY | O_TRUNC | O_CLOEXEC, 0, 0, 0);
    if (fd < 0) return fd;
    long done = make(all, SYS_write, (uint64_t)fd, (uint64_t)text, strlen(text), 0, 0);
    fl_plain(SYS_close, (uint64_t)fd, 0, 0, 0, 0, 0);
    return done;
}

// MARK: Instances of keepers that were killed

typedef struct entry {
    uint64_t inode, offset;
    uint16_t length;
    uint8_t type;
    char name[];
} entry;

/// Whether the name is an instance's whose keeper is gone.
static int is_left_over(const char *name) {
    if (strncmp(name, PREFIX, sizeof PREFIX - 1) != 0) return 0;
    uint64_t number = 0;
    for (const char *digit = name + sizeof PREFIX - 1; *digit; digit++) {
        if (*digit < '0' || *digit > '9' || number > INT32_MAX / 10) return 0;
        number = number * 10 + (uint64_t)(*digit - '0');
    }
    return number > 1 && fl_plain(SYS_kill, number, 0, 0, 0, 0, 0) == -ESRCH;
}

/// The kernel refuses to remove an instance that a process has open, whatever the process's number is here.
static void remove_left_over(fl_shared *all) {
    uint64_t buffer[512];
    long fd = make(all, SYS_open, (uint64_t)INSTANCES, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0, 0, 0);
    if (fd < 0) return;
    long got;
    while ((got = make(all, SYS_getdents64, (uint64_t)fd, (uint64_t)buffer, sizeof buffer, 0, 0)) > 0) {
        for (long at = 0; at < got;) {
            const entry *found = (const entry *)((char *)buffer + at);
            at += found->length;
            if (!is_left_over(found->name)) continue;
            char path[fl_most_path] = INSTANCES "/";
            append(path, found->name);
            fl_plain(SYS_rmdir, (uint64_t)path, 0, 0, 0, 0, 0);
        }
    }
    fl_plain(SYS_close, (uint64_t)fd, 0, 0, 0, 0, 0);
}

// MARK: The instance

static long set_up(fl_shared *all) {
    // The filter comes before the events: of the keeper's children and theirs, and nobody else's.
    static const char *const settings[][2] = {
        {"/tracing_on", "0"}, {"/options/event-fork", "1"}, {"/set_event_pid", 0}, {"/trace_clock", "mono"},
        {"/buffer_size_kb", "16384"}, {"/options/overwrite", "0"}, {"/events/kvmmmu/enable", "1"},
        {"/events/kvm/kvm_unmap_hva_range/enable", "1"},
    };
    char number[fl_most_path] = "";
    append_number(number, (uint64_t)fl_plain(SYS_getpid, 0, 0, 0, 0, 0, 0));
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        long failed = write_file(all, settings[i][0], settings[i][1] ? settings[i][1] : number);
        if (failed < 0) return failed;
    }
    char path[fl_most_path];
    return make(all, SYS_open, (uint64_t)path_in(all, "/trace_marker", path), O_WRONLY | O_CLOEXEC, 0, 0, 0);
}

/// On one processor the kernel's lists of pages are one processor's: whether a page is reused or copied is no matter of luck.
/// Best effort.
static void stay_here(fl_shared *all) {
    uint32_t processor = 0;
    uint64_t mask[16] = {0};
    if (make(all, SYS_getcpu, (uint64_t)&processor, 0, 0, 0, 0) < 0 || processor >= sizeof mask * 8) return;
    mask[processor / 64] = UINT64_C(1) << processor % 64;
    make(all, SYS_sched_setaffinity, 0, sizeof mask, (uint64_t)mask, 0, 0);
}

/// Mounts tracefs where only the calling process sees it. 0, or what failed.
static uint32_t mount_alone(fl_shared *all, long *error) {
    *error = make(all, SYS_unshare, CLONE_NEWNS, 0, 0, 0, 0);
    if (*error >= 0) *error = make(all, SYS_mount, 0, (uint64_t)"/", 0, MS_REC | MS_PRIVATE, 0);
    if (*error < 0) return fl_kvm_at_rights;
    *error = make(all, SYS_mount, (uint64_t)"faultline", (uint64_t)TRACEFS, (uint64_t)"tracefs", 0, 0);
    return *error < 0 ? fl_kvm_at_tracing : 0;
}

uint32_t fl_trace_open(fl_shared *all, long *error) {
    stay_here(all);
    uint32_t failed = mount_alone(all, error);
    if (failed) return failed;
    remove_left_over(all);
    append(all->instance, PREFIX);
    append_number(all->instance, (uint64_t)fl_plain(SYS_getpid, 0, 0, 0, 0, 0, 0));
    char path[fl_most_path];
    *error = make(all, SYS_mkdir, (uint64_t)path_in(all, "", path), 0700, 0, 0, 0);
    if (*error < 0) {
        all->instance[0] = 0;
        return fl_kvm_at_tracing;
    }
    *error = set_up(all);
    if (*error < 0) return fl_kvm_at_tracing;
    all->marker = (int)*error;
    return 0;
}

static void remove_instance(const fl_shared *all) {
    char path[fl_most_path];
    int64_t start = fl_milliseconds();
    // Busy while one who reads it, or a worker that is just ending, has it open.
    while (fl_plain(SYS_rmdir, (uint64_t)path_in(all, "", path), 0, 0, 0, 0, 0) == -EBUSY &&
           fl_milliseconds() - start < 2000)
        fl_plain(SYS_poll, 0, 0, 10, 0, 0, 0);
}

void fl_trace_close(fl_shared *all) {
    if (!all->instance[0]) return;
    if (all->marker > 0) fl_plain(SYS_close, (uint64_t)all->marker, 0, 0, 0, 0, 0);
    remove_instance(all);
}

void fl_trace_clear(fl_shared *all) {
    long error;
    if (mount_alone(all, &error) == 0) remove_instance(all);
}

long fl_trace_begin(fl_shared *all) {
    if (!all->instance[0]) return 0;
    // An empty buffer.
    long failed = write_file(all, "/trace", "");
    return failed < 0 ? failed : write_file(all, "/tracing_on", "1");
}

long fl_trace_end(fl_shared *all) { return all->instance[0] ? write_file(all, "/tracing_on", "0") : 0; }

void fl_mark(const fl_shared *all, const char *what) {
    if (all->marker <= 0) return;
    char text[fl_most_path] = "PROBE line ";
    append_number(text, all->calls_done);
    append(text, what);
    fl_plain(SYS_write, (uint64_t)all->marker, (uint64_t)text, strlen(text), 0, 0, 0);
}

#endif
