#include "CBenchmarkLimits.h"

#include <stdlib.h>

enum { page_bytes = 4096, page_shift = 12, frame_bytes = 64, line = 64 };

// Four levels of tables, one after another, level 4 first. Entries of upper tables: the next table's offset from the first.
static size_t tables_at(size_t pages, int level) {
    size_t span = (size_t)1 << (9 * level);
    return (pages + span - 1) / span;
}

size_t limit_radix_size(size_t pages) {
    size_t count = 0;
    for (int level = 1; level <= 4; level++) count += tables_at(pages, level);
    return count * page_bytes;
}

void limit_radix_make(void *tables, const uint32_t *order, size_t pages) {
    uint64_t *at = tables;
    size_t start = 0;
    for (int level = 4; level > 1; level--) {
        size_t next = start + tables_at(pages, level);
        for (size_t i = 0; i < tables_at(pages, level - 1); i++) at[start * 512 + i] = (next + i) * page_bytes;
        start = next;
    }
    for (size_t i = 0; i < pages; i++) at[start * 512 + i] = order ? (uint64_t)order[i] << page_shift | 0x67 : 0;
}

static uint64_t *walk(void *tables, size_t page) {
    uint64_t table = 0;
    for (int level = 4; level > 1; level--) {
        uint64_t *entry = (uint64_t *)((char *)tables + table) + (page >> (9 * (level - 1)) & 511);
        table = __atomic_load_n(entry, __ATOMIC_ACQUIRE);
    }
    return (uint64_t *)((char *)tables + table) + (page & 511);
}

// Between two faults the guest runs: entering and leaving it waits for all that was begun, so that no fault's memory
// accesses overlap with another's.
static void begin_alone(void) {
#if defined(__x86_64__)
    __builtin_ia32_lfence();
#endif
}

size_t limit_faults(
    void *host, void *guest, void *frames, const uint32_t *pages, size_t count, int sections) {
    static _Thread_local struct { _Alignas(line) uint64_t word; } own[8];
    size_t installed = 0;
    for (size_t i = 0; i < count; i++) {
        begin_alone();
        uint64_t *leaf = walk(guest, pages[i]);
        __builtin_prefetch(leaf, 1);
        for (int s = 0; s < sections; s++) __atomic_fetch_add(&own[s & 7].word, 1, __ATOMIC_SEQ_CST);
        uint64_t entry = __atomic_load_n(walk(host, pages[i]), __ATOMIC_ACQUIRE);
        uint64_t *frame = (uint64_t *)((char *)frames + (entry >> page_shift) * frame_bytes);
        uint32_t *references = (uint32_t *)(frame + 1);
        uint32_t seen = __atomic_load_n(references, __ATOMIC_RELAXED);
        if (!__atomic_compare_exchange_n(references, &seen, seen + 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) continue;
        if (__atomic_load_n(walk(host, pages[i]), __ATOMIC_ACQUIRE) != entry) continue;
        uint64_t old = 0;
        installed += __atomic_compare_exchange_n(leaf, &old, entry, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
        if ((__atomic_load_n(frame, __ATOMIC_RELAXED) & 3) != 3) __atomic_fetch_or(frame, 3, __ATOMIC_RELAXED);
        __atomic_fetch_sub(references, 1, __ATOMIC_ACQ_REL);
        for (int s = 0; s < sections; s++)
            __atomic_store_n(&own[s & 7].word, __atomic_load_n(&own[s & 7].word, __ATOMIC_RELAXED) - 1, __ATOMIC_RELEASE);
    }
    return installed;
}

void limit_split(uint64_t *tables, size_t count, uint64_t entry) {
    for (size_t i = 0; i < count; i++) {
        __atomic_store_n(&tables[i], entry, __ATOMIC_RELAXED);
        entry += page_bytes;
    }
}
