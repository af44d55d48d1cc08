#include "CSchedule.h"

FL_TASK_LOCAL fl_task *fl_task_current;
FL_TASK_LOCAL fl_held fl_held_default;
FL_TASK_LOCAL uint32_t fl_objects_made_default;

#if defined(__linux__)
#include <sched.h>
void fl_yield(void) { sched_yield(); }
#else
void fl_yield(void) { fl_pause(); }
#endif
