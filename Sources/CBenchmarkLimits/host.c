#include "CBenchmarkLimits.h"

#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { page_bytes = 4096, page_shift = 12, frame_bytes = 64, writable = 2 };

static uint32_t *counter(void *frames, uint64_t entry) {
    return (uint32_t *)((char *)frames + (entry >> page_shift) * frame_bytes);
}

static void clear_page(void *page) {
#if defined(__x86_64__)
    size_t words = page_bytes / 8;
    __asm__ volatile("rep stosq" : "+D"(page), "+c"(words) : "a"(0ul) : "memory");
#else
    memset(page, 0, page_bytes);
    __asm__ volatile("" ::: "memory");
#endif
}

void limit_clear(void *pages, size_t count) {
    for (size_t i = 0; i < count; i++) clear_page((char *)pages + i * page_bytes);
}

void limit_fault(uint64_t *entries, void *frames, void *pages, size_t count) {
    for (size_t i = 0; i < count; i++) {
        __atomic_store_n(counter(frames, i << page_shift), 1, __ATOMIC_RELEASE);
        __atomic_store_n(&entries[i], i << page_shift | 0x67, __ATOMIC_RELEASE);
        __atomic_store_n((uint64_t *)((char *)pages + i * page_bytes), i, __ATOMIC_RELEASE);
    }
}

void limit_fork(uint64_t *parent, uint64_t *child, void *frames, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint64_t entry = __atomic_load_n(&parent[i], __ATOMIC_ACQUIRE);
        __atomic_fetch_add(counter(frames, entry), 1, __ATOMIC_RELAXED);
        __atomic_fetch_and(&parent[i], ~(uint64_t)writable, __ATOMIC_ACQ_REL);
        __atomic_store_n(&child[i], entry & ~(uint64_t)writable, __ATOMIC_RELEASE);
    }
}

void limit_exit(uint64_t *child, void *frames, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint64_t entry = __atomic_exchange_n(&child[i], 0, __ATOMIC_ACQ_REL);
        __atomic_fetch_sub(counter(frames, entry), 1, __ATOMIC_ACQ_REL);
    }
}

// Entries of upper tables: the next table's offset from the first. The first three tables: levels 4, 3, 2.
size_t limit_tables_size(size_t count) { return 3 * page_bytes + (count + 511) / 512 * page_bytes; }

void limit_make_tables(void *tables, const uint32_t *order, size_t count) {
    char *base = tables;
    *(uint64_t *)base = page_bytes;
    *(uint64_t *)(base + page_bytes) = 2 * page_bytes;
    for (size_t i = 0; i < (count + 511) / 512; i++) ((uint64_t *)(base + 2 * page_bytes))[i] = (3 + i) * page_bytes;
    for (size_t i = 0; i < count; i++)
        ((uint64_t *)(base + 3 * page_bytes))[i] = (uint64_t)order[i] << page_shift | 0x67;
}

static const uint64_t *entry_at(const void *tables, uint64_t table, size_t index) {
    return (const uint64_t *)((const char *)tables + table) + index;
}

size_t limit_get_pages(const void *tables, void *frames, const uint32_t *pages, size_t count) {
    size_t found = 0;
    for (size_t i = 0; i < count; i++) {
        size_t page = pages[i];
        uint64_t upper = __atomic_load_n(entry_at(tables, 0, page >> 27), __ATOMIC_ACQUIRE);
        uint64_t middle = __atomic_load_n(entry_at(tables, upper, page >> 18 & 511), __ATOMIC_ACQUIRE);
        uint64_t last = __atomic_load_n(entry_at(tables, middle, page >> 9 & 511), __ATOMIC_ACQUIRE);
        const uint64_t *word = entry_at(tables, last, page & 511);
        uint64_t entry = __atomic_load_n(word, __ATOMIC_ACQUIRE);
        uint32_t *references = counter(frames, entry);
        uint32_t seen = __atomic_load_n(references, __ATOMIC_RELAXED);
        if (!__atomic_compare_exchange_n(references, &seen, seen + 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) continue;
        found += __atomic_load_n(word, __ATOMIC_ACQUIRE) == entry;
        __atomic_fetch_sub(references, 1, __ATOMIC_ACQ_REL);
    }
    return found;
}

// malloc's caches of small freed blocks count as given out; what comes from them would not be seen.
enum { classes = 64, blocks = 64 };
static void *cached[classes][blocks];

void limit_empty_caches(void) {
    for (int i = 0; i < classes; i++)
        for (int j = 0; j < blocks; j++) cached[i][j] = malloc(24 + (size_t)i * 16);
}

void limit_fill_caches(void) {
    for (int i = 0; i < classes; i++)
        for (int j = 0; j < blocks; j++) free(cached[i][j]);
}

size_t limit_heap_bytes(void) {
    struct mallinfo2 held = mallinfo2();
    return held.uordblks + held.hblkhd;
}

size_t limit_resident_bytes(void) {
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file) return 0;
    unsigned long total, resident = 0;
    if (fscanf(file, "%lu %lu", &total, &resident) != 2) resident = 0;
    fclose(file);
    return resident * (size_t)sysconf(_SC_PAGESIZE);
}
