#include "CSchedule.h"

FL_TASK_LOCAL fl_task *fl_task_current;
FL_TASK_LOCAL fl_held fl_held_default;
FL_TASK_LOCAL uint32_t fl_objects_made_default;
FL_TASK_LOCAL uint32_t fl_line_default;

uint32_t fl_take_line(void) {
    static uint32_t next;
    uint32_t line = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) & (fl_lines - 1);
    fl_line_default = line + 1;
    return line;
}

#if defined(__linux__)
#include <sched.h>
void fl_yield(void) { sched_yield(); }
#else
void fl_yield(void) { fl_pause(); }
#endif
