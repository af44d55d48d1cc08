// The switch of fibers, tried out: compiled for this machine, and for AArch64 where a cross compiler and qemu are installed
// (Tests/ExplorerTests/FiberTests.swift). Prints what is wrong and ends with 1, or prints "ok".
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

#include "CFiber.h"

enum { fiber_count = 3, rounds = 1000 };

static fl_fiber main_fiber, fibers[fiber_count];
static int numbers[fiber_count], finished, failures;
static char order[fiber_count * rounds + 1];
static size_t turns;

static void expect(int condition, const char *what) {
    if (condition) return;
    printf("wrong: %s\n", what);
    failures++;
}

/// Values that are different in each fiber and round, kept in every register that a call must preserve: the compiler has
/// more of them alive across the switch than there are such registers, so some lie on the stack, which is kept too.
static void turn(int me, int round, fl_fiber *next) {
    volatile double seed = me * 1000.0 + round;
    volatile long key = me * 100000L + round;
    double d0 = seed + 0.25, d1 = seed * 2, d2 = seed * 3, d3 = seed * 4, d4 = seed * 5, d5 = seed * 6, d6 = seed * 7,
           d7 = seed * 8, d8 = seed * 9;
    long a = key + 1, b = key + 2, c = key + 3, d = key + 4, e = key + 5, f = key + 6, g = key + 7, h = key + 8,
         i = key + 9, j = key + 10, k = key + 11;
#if defined(__x86_64__) || defined(__aarch64__)
    __asm__ volatile("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d), "+r"(e), "+r"(f));
    __asm__ volatile("" : "+r"(g), "+r"(h), "+r"(i), "+r"(j), "+r"(k));
#endif
    order[turns++] = (char)('A' + me);
    fl_fiber_switch(&fibers[me], next);
    expect(a == key + 1 && b == key + 2 && c == key + 3 && d == key + 4 && e == key + 5 && f == key + 6, "integers");
    expect(g == key + 7 && h == key + 8 && i == key + 9 && j == key + 10 && k == key + 11, "more integers");
    expect(d0 == seed + 0.25 && d1 == seed * 2 && d2 == seed * 3 && d3 == seed * 4 && d4 == seed * 5, "doubles");
    expect(d5 == seed * 6 && d6 == seed * 7 && d7 == seed * 8 && d8 == seed * 9, "more doubles");
}

static void body(void *argument) {
    int me = *(int *)argument;
    char local;
    expect((uintptr_t)__builtin_frame_address(0) % 16 == 0, "the stack is not aligned");
    expect(&local > (char *)fibers[me].stack && &local < (char *)fibers[me].stack + fibers[me].stack_size,
           "a fiber does not run on its own stack");
    for (int round = 0; round < rounds; round++) turn(me, round, &fibers[(me + 1) % fiber_count]);
    finished++;
    fl_fiber_switch(&fibers[me], me + 1 < fiber_count ? &fibers[me + 1] : &main_fiber);
    expect(0, "a fiber went on after its end");
}

static sigjmp_buf out_of_the_handler;
static void overflowed(int signal) {
    (void)signal;
    siglongjmp(out_of_the_handler, 1);
}

int main(void) {
    for (int again = 0; again < 2; again++) {
        // The second time on stacks that were used before.
        for (int i = 0; i < fiber_count; i++) {
            numbers[i] = i;
            if (!again && fl_fiber_map(&fibers[i], 256 << 10) != 0) return 2;
            fl_fiber_prepare(&fibers[i], body, &numbers[i]);
        }
        finished = 0;
        turns = 0;
        fl_fiber_switch(&main_fiber, &fibers[0]);
        expect(finished == fiber_count, "not every fiber came to its end");
        int in_order = turns == sizeof order - 1;
        for (size_t i = 0; i < turns; i++) in_order &= order[i] == (char)('A' + i % fiber_count);
        expect(in_order, "the fibers took other turns than they gave");
    }

    // Below a stack lies a page that nobody may touch.
    signal(SIGSEGV, overflowed);
    if (sigsetjmp(out_of_the_handler, 1) == 0) {
        ((volatile char *)fibers[0].stack)[-1] = 1;
        expect(0, "a stack that overflows writes to other memory");
    }
    for (int i = 0; i < fiber_count; i++) fl_fiber_unmap(&fibers[i]);
    uint64_t before = fl_nanoseconds();
    expect(before > 0 && fl_nanoseconds() >= before, "the clock runs backwards");
    if (failures) return 1;
    puts("ok");
    return 0;
}
