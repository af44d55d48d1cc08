// The running task, as the core sees it. The core's only C.
//
// A task is a thread, a fiber of the explorer, or a hart. It owns what the checks of lock order need, and, when an
// explorer drives it, the hooks that are called at every scheduling point. All of it belongs to the task, never to the
// process: two explorers and real threads run side by side.
#pragma once
#include <stdint.h>

/// What a task holds, and what went wrong in how it held it.
typedef struct fl_held {
    uint64_t ranks;             ///< bit r: a lock of rank r is held
    uint32_t atomic_depth;      ///< spinning locks and read-side sections in which sleeping is forbidden
    uint32_t order_violations;  ///< acquisitions against the lock order
    uint32_t sleep_violations;  ///< sleeping operations while atomic_depth > 0
    uint32_t first_held;        ///< ranks of the first violation
    uint32_t first_wanted;
} fl_held;

/// A task that an explorer drives.
typedef struct fl_task {
    /// Called before an operation on shared state; may let other tasks go first.
    void (*point)(struct fl_task *task, uint32_t operation, uint64_t object);
    /// Called for an operation before which no switch is worth while; only tells.
    void (*note)(struct fl_task *task, uint32_t operation, uint64_t object);
    uint32_t identity;
    uint32_t objects_made;
    /// Bit n: the defect n of the museum is switched on.
    uint64_t defects;
    /// Bit n % 64 of word n / 64: the series' patch n is taken back.
    uint64_t undone[2];
    fl_held held;
} fl_task;

#if defined(__linux__)
#define FL_TASK_LOCAL _Thread_local __attribute__((tls_model("initial-exec")))
#else
#define FL_TASK_LOCAL  // bare metal: one hart
#endif

extern FL_TASK_LOCAL fl_task *fl_task_current;
extern FL_TASK_LOCAL fl_held fl_held_default;
extern FL_TASK_LOCAL uint32_t fl_objects_made_default;

static inline int fl_attached(void) { return fl_task_current != 0; }

static inline void fl_point(uint32_t operation, uint64_t object) {
    fl_task *task = fl_task_current;
    if (__builtin_expect(task != 0, 0)) task->point(task, operation, object);
}

static inline void fl_note(uint32_t operation, uint64_t object) {
    fl_task *task = fl_task_current;
    if (__builtin_expect(task != 0, 0)) task->note(task, operation, object);
}

/// Whether a defect is switched on: never without an explorer.
static inline int fl_defect(uint32_t number) {
    fl_task *task = fl_task_current;
    if (__builtin_expect(task == 0, 1)) return 0;
    return (int)(task->defects >> number & 1);
}

/// Whether a patch of the series is taken back: never without a task of one's own.
static inline int fl_undone(uint32_t patch) {
    fl_task *task = fl_task_current;
    if (__builtin_expect(task == 0, 1)) return 0;
    return (int)(task->undone[patch >> 6 & 1] >> (patch & 63) & 1);
}

static inline fl_held *fl_held_current(void) {
    fl_task *task = fl_task_current;
    return task ? &task->held : &fl_held_default;
}

static inline fl_task *fl_current(void) { return fl_task_current; }
static inline void fl_attach(fl_task *task) { fl_task_current = task; }

/// A name for a shared object that is the same in every run that makes the same objects in the same order by task:
/// bit 63, the making task, its count, and 20 bits for the object's parts. An address would differ from run to run.
static inline uint64_t fl_new_identity(void) {
    fl_task *task = fl_task_current;
    uint64_t maker = task ? task->identity + 1u : 0u;
    uint32_t count = task ? ++task->objects_made : ++fl_objects_made_default;
    return 1ull << 63 | maker << 52 | (uint64_t)count << 20;
}

/// Before a run that is to name its objects as the last one did.
static inline void fl_reset_identities(void) { fl_objects_made_default = 0; }

/// Over how many lines of memory tasks spread what they write often and others read seldom. The last one is everybody's
/// who has none of their own.
enum { fl_lines = 16, fl_common_line = fl_lines - 1 };
extern FL_TASK_LOCAL uint32_t fl_line_default;  ///< 0: none yet, else the number, plus 1
/// Gives the thread a line of its own until it ends, if one is left.
uint32_t fl_take_line(void);

/// The running task's line: always the same for one thread. But for `fl_common_line` it is no other thread's. Nothing but
/// speed depends on the number.
static inline uint32_t fl_line(void) {
    if (__builtin_expect(fl_task_current != 0, 0)) return fl_common_line;
    uint32_t line = fl_line_default;
    return __builtin_expect(line != 0, 1) ? line - 1 : fl_take_line();
}

/// Asks the processor to bring the line of `address`, which is about to be written.
static inline void fl_prefetch(const void *address) { __builtin_prefetch(address, 1); }

/// Tells the processor that the task spins.
static inline void fl_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#else
    __asm__ volatile("" ::: "memory");
#endif
}

/// Gives the processor to another task: `sched_yield` on Linux; on bare metal a pause.
void fl_yield(void);
