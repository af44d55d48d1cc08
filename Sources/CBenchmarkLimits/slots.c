#include <string.h>

#include "CBenchmarkLimits.h"

typedef struct {
    uint64_t first, count, address;
} limit_slot;

uint64_t limit_hinted_lookups(const uint64_t *frames, size_t count) {
    // Nothing is known at compile time: the pointers are followed again for each frame.
    static limit_slot slot = {0, 1ull << 40, 0};
    static limit_slot *volatile hint = &slot;
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++) {
        const limit_slot *found = __atomic_load_n(&hint, __ATOMIC_ACQUIRE);
        uint64_t offset = frames[i] - found->first;
        if (offset < found->count) sum += found->address + (offset << 12);
    }
    return sum;
}

uint64_t limit_searches(const uint64_t *bases, size_t slots, const uint64_t *frames, size_t count) {
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++) {
        size_t low = 0, high = slots;
        while (low < high) {
            size_t middle = (low + high) / 2;
            if (bases[middle] <= frames[i]) low = middle + 1;
            else high = middle;
        }
        sum += low;
    }
    return sum;
}

uint64_t limit_run_changes(size_t count) {
    static void *run[4][65];
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++) {
        for (int index = 0; index < 4; index++) {
            void **middle = run[index] + 32;
            memmove(middle + 1, middle, 32 * sizeof *middle);
            *middle = &run[index][i & 63];
            __asm__ volatile("" ::: "memory");
            sum += *middle != 0;
            memmove(middle, middle + 1, 32 * sizeof *middle);
        }
    }
    return sum;
}
