#include "CBenchmarkLimits.h"

void limit_exchange(uint64_t *words, size_t count, uint64_t value) {
    for (size_t i = 0; i < count; i++) (void)__atomic_exchange_n(&words[i], value, __ATOMIC_ACQ_REL);
}

void limit_and(uint64_t *words, size_t count, uint64_t mask) {
    // The old value is not asked for: with it the instruction would be a loop of cmpxchg instead of `lock and`.
    for (size_t i = 0; i < count; i++) (void)__atomic_fetch_and(&words[i], mask, __ATOMIC_ACQ_REL);
}

void limit_compare_exchange(uint64_t *words, const uint32_t *order, size_t count, uint64_t expected, uint64_t desired) {
    for (size_t i = 0; i < count; i++) {
        uint64_t seen = expected;
        (void)__atomic_compare_exchange_n(
            &words[order[i]], &seen, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    }
}

void limit_copy(void *to, const void *from, size_t count) {
    for (size_t i = 0; i < count; i++) {
        void *target = (char *)to + i * 4096;
        const void *source = (const char *)from + i * 4096;
        size_t bytes = 4096;
        __asm__ volatile("rep movsb" : "+D"(target), "+S"(source), "+c"(bytes) : : "memory");
    }
}
