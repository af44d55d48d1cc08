#define _GNU_SOURCE
#include "CSystemCalls.h"

#include <errno.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

long fl_plain(long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f) {
    long result = syscall(number, a, b, c, d, e, f);
    return result == -1 ? -errno : result;
}

long fl_call(fl_switch *s, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f) {
    if (++s->made == s->forced) return -s->error;
    return fl_plain(number, a, b, c, d, e, f);
}

void fl_set_word(_Atomic int *word, int value) {
    atomic_store(word, value);
    fl_plain(SYS_futex, (uint64_t)word, FUTEX_WAKE, 1 << 30, 0, 0, 0);
}

int64_t fl_milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000) + now.tv_nsec / 1000000;
}

int fl_await_word(_Atomic int *word, int wanted, int milliseconds) {
    int64_t start = fl_milliseconds();
    struct timespec slice = {.tv_sec = 0, .tv_nsec = 100000000};
    for (;;) {
        int seen = atomic_load(word);
        if (seen == wanted) return 0;
        fl_plain(SYS_futex, (uint64_t)word, FUTEX_WAIT, (uint64_t)seen, (uint64_t)&slice, 0, 0);
        if (fl_milliseconds() - start > milliseconds) return ETIMEDOUT;
    }
}
