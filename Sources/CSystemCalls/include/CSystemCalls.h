// Linux's system calls as numbers with a result, and what processes that do as they are told have in common: a word to wait
// on, and accesses whose signal they survive. Linux only.
//
// Nothing here allocates, locks, or needs the C library's state: a process that was forked from one with many threads may
// call it all.
#pragma once
#include <stdint.h>

/// Counts system calls, and can have one fail without being made.
typedef struct fl_switch {
    uint64_t made;
    /// The number, from 1, of the call that fails; 0: none.
    uint64_t forced;
    /// With this errno.
    int32_t error;
} fl_switch;

/// One system call: what it returns, or minus its errno.
long fl_call(fl_switch *s, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f);
/// One that is neither counted nor forced: waiting, and what the harness does for itself.
long fl_plain(long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f);

/// Sets a word of shared memory and wakes who waits for it.
void fl_set_word(_Atomic int *word, int value);
/// Waits until the word is `wanted`; 0, or ETIMEDOUT after `milliseconds` or a little more.
int fl_await_word(_Atomic int *word, int wanted, int milliseconds);

/// Monotonic time in milliseconds.
int64_t fl_milliseconds(void);

/// From here on SIGSEGV and SIGBUS of `fl_access` are survived, and of anything else end the process with status 3.
void fl_catch_signals(void);
/// Every signal does again what it does at a program's start.
void fl_reset_signals(void);
/// Loads or stores 1, 2, 4 or 8 bytes. 0, SIGSEGV, or SIGBUS.
int fl_access(uint64_t address, uint64_t bytes, int stores, uint64_t *value);
