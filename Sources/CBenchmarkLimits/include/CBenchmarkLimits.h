// Limits for the benchmark: the same number of the same atomic instruction on a flat array, and nothing else.
#pragma once
#include <stddef.h>
#include <stdint.h>

/// xchg on each word. What a zap of all leaves can't do without.
void limit_exchange(uint64_t *words, size_t count, uint64_t value);
/// lock and on each word. What clearing D or W in all leaves can't do without.
void limit_and(uint64_t *words, size_t count, uint64_t mask);
/// lock cmpxchg on the words that `order` names, in that order. What installing all leaves can't do without.
void limit_compare_exchange(uint64_t *words, const uint32_t *order, size_t count, uint64_t expected, uint64_t desired);

// The host's operations. Page frames are 64 bytes each, their counter first; an entry is a frame number times 4096, plus
// bits; `frames` and entries are flat arrays but for `limit_get_pages`.

/// Clears 4 KiB at a time, one page after another. What a fault on memory that held something can't do without.
void limit_clear(void *pages, size_t count);
/// For each page: one store to its page frame, one to its entry, one to its bytes. What a fault on a page that is known
/// to be zero can't do without.
void limit_fault(uint64_t *entries, void *frames, void *pages, size_t count);
/// For each entry: read, `lock and` of the parent's, `lock add` on the page frame, write of the child's.
void limit_fork(uint64_t *parent, uint64_t *child, void *frames, size_t count);
/// Copies `count` pages, one by one.
void limit_copy(void *to, const void *from, size_t count);
/// For each entry: xchg, `lock sub` on the page frame.
void limit_exit(uint64_t *child, void *frames, size_t count);
/// Bytes of the tables that `limit_get_pages` walks, for `count` pages, at most 2^18: three of them, and the last level.
size_t limit_tables_size(size_t count);
/// Four levels of tables at `tables`: page `i` is at frame `order[i]`.
void limit_make_tables(void *tables, const uint32_t *order, size_t count);
/// For each of `pages`: 4 dependent loads, `lock cmpxchg` on the page frame, the last entry again, `lock sub`. Returns how
/// many were found.
size_t limit_get_pages(const void *tables, void *frames, const uint32_t *pages, size_t count);

// Slots.

/// For each frame: the hint read again, its range compared, the user address computed. Returns a sum of those.
uint64_t limit_hinted_lookups(const uint64_t *frames, size_t count);
/// For each frame: a binary search among `slots` ascending numbers.
uint64_t limit_searches(const uint64_t *bases, size_t slots, const uint64_t *frames, size_t count);
/// For each change: a pointer put into the middle of a run of 64 and taken out again, in four runs: two indexes in order,
/// two sets.
uint64_t limit_run_changes(size_t count);

// What this process holds, for the price of the model itself.

/// Around two calls of `limit_heap_bytes`: blocks up to 1 KiB come from fresh memory in between. One caller at a time.
void limit_empty_caches(void);
void limit_fill_caches(void);
/// Bytes that malloc has given out.
size_t limit_heap_bytes(void);
/// Bytes in the machine's memory; 0: the kernel doesn't tell.
size_t limit_resident_bytes(void);

/// So many system calls that do next to nothing. What a script on a kernel can't do without.
void limit_system_calls(size_t count);

// x86's two-dimensional paging.

/// Bytes of four levels of tables for `pages`.
size_t limit_radix_size(size_t pages);
/// Makes them at `tables`, zeroed memory: page `i` is at frame `order[i]`; nil: the last level stays empty.
void limit_radix_make(void *tables, const uint32_t *order, size_t pages);
/// The faults of `pages` and nothing else: for each the guest's tables walked; `sections` words of the thread's own,
/// each in a line of its own, raised by locked additions and, at the end, lowered by stores; the host's tables walked, `lock cmpxchg`
/// on the page frame, the walk again; `lock cmpxchg` on the guest's entry; `lock or` on the page frame if it is not marked
/// yet; `lock sub` on it. Returns how many entries were empty.
size_t limit_faults(void *host, void *guest, void *frames, const uint32_t *pages, size_t count, int sections);
/// Plain stores of ascending frames to each word. What a split can't do without.
void limit_split(uint64_t *tables, size_t count, uint64_t entry);

/// What ran between two points: instructions, those of them that lock a line, and which lines, each once.
typedef struct {
    uint64_t instructions, locked;
    uint32_t lines;
    uint64_t line[64];
} limit_steps;
/// Runs `body` one instruction at a time. One caller at a time. -1: this processor or system can't.
int limit_step(void (*body)(void *), void *context, limit_steps *steps);
