#include "CSchedule.h"

FL_TASK_LOCAL fl_task *fl_task_current;
FL_TASK_LOCAL fl_held fl_held_default;
FL_TASK_LOCAL uint32_t fl_objects_made_default;
FL_TASK_LOCAL uint32_t fl_line_default;

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
void fl_yield(void) { sched_yield(); }

static uint32_t taken;  // bit n: line n is a thread's
static pthread_key_t at_end;
static int is_ready;

static void give_back(void *line) {
    fl_line_default = 0;
    __atomic_fetch_and(&taken, ~(1u << ((uintptr_t)line - 1)), __ATOMIC_RELEASE);
}

__attribute__((constructor)) static void prepare(void) { is_ready = pthread_key_create(&at_end, give_back) == 0; }

uint32_t fl_take_line(void) {
    uint32_t line = fl_common_line, seen = __atomic_load_n(&taken, __ATOMIC_ACQUIRE);
    while (is_ready && ~seen & ((1u << fl_common_line) - 1)) {
        uint32_t first = (uint32_t)__builtin_ctz(~seen);
        if (!__atomic_compare_exchange_n(&taken, &seen, seen | 1u << first, 0, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE))
            continue;
        // A thread that can't be told when it ends keeps none.
        if (pthread_setspecific(at_end, (void *)(uintptr_t)(first + 1)) == 0) line = first;
        else __atomic_fetch_and(&taken, ~(1u << first), __ATOMIC_RELEASE);
        break;
    }
    fl_line_default = line + 1;
    return line;
}
#else
void fl_yield(void) { fl_pause(); }
uint32_t fl_take_line(void) { return fl_common_line; }
#endif
