// Fibers: a stack each, switched by hand. For x86-64 (System V) and AArch64 (AAPCS64) on Linux.
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef struct fl_fiber {
    void *stack_pointer;  ///< where the fiber goes on; owned by `fl_fiber_switch`
    void *stack;          ///< lowest usable address; below it lies a guard page
    size_t stack_size;
} fl_fiber;

/// Maps a stack of `stack_size` bytes (a multiple of 4096) with a guard page below. 0, or an errno.
int fl_fiber_map(fl_fiber *fiber, size_t stack_size);
void fl_fiber_unmap(fl_fiber *fiber);

/// The next switch to `fiber` calls `entry(argument)` on its stack, which must never return.
void fl_fiber_prepare(fl_fiber *fiber, void (*entry)(void *), void *argument);

/// Leaves the running context in `from` and goes on in `to`. Callee-saved registers are kept; the floating-point
/// control words are not, since nobody here changes them.
void fl_fiber_switch(fl_fiber *from, fl_fiber *to);

/// What the trap handler says when the code under test traps. Plain memory: the handler reads it as it is.
typedef struct fl_trap_report {
    const uint8_t *choices;     ///< the task chosen at each point so far
    const uint64_t *count;      ///< how many
    const uint32_t *running;    ///< the running task
    const char *command;        ///< what reproduces the run, up to the schedule
    int json;
} fl_trap_report;

/// Makes SIGILL, SIGTRAP, SIGSEGV, SIGBUS, SIGFPE and SIGABRT print `report` and end the process with status 1. The
/// handlers run on a stack of their own. Null takes them away.
void fl_trap_install(const fl_trap_report *report);

/// Nanoseconds of the monotonic clock.
uint64_t fl_nanoseconds(void);
