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
