#define _GNU_SOURCE
#include "CFiber.h"

#include <errno.h>
#include <sys/mman.h>
#include <time.h>

int fl_fiber_map(fl_fiber *fiber, size_t stack_size) {
    char *base = mmap(0, stack_size + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (base == MAP_FAILED) return errno;
    if (mprotect(base, 4096, PROT_NONE) != 0) {
        int error = errno;
        munmap(base, stack_size + 4096);
        return error;
    }
    fiber->stack = base + 4096;
    fiber->stack_size = stack_size;
    fiber->stack_pointer = 0;
    return 0;
}

void fl_fiber_unmap(fl_fiber *fiber) {
    if (fiber->stack) munmap((char *)fiber->stack - 4096, fiber->stack_size + 4096);
    fiber->stack = 0;
}

void fl_fiber_switch_stack(void **save, void *load);
void fl_fiber_start(void);

void fl_fiber_switch(fl_fiber *from, fl_fiber *to) { fl_fiber_switch_stack(&from->stack_pointer, to->stack_pointer); }

#if defined(__x86_64__)
// The frame that a switch pops: r15 r14 r13 r12 rbx rbp, then the return address. `fl_fiber_start` finds entry in rbx
// and argument in r12; at its call the stack is 16-byte aligned, as the ABI wants it.
__asm__(
    ".text\n.globl fl_fiber_switch_stack\n.hidden fl_fiber_switch_stack\n.type fl_fiber_switch_stack,@function\n"
    "fl_fiber_switch_stack:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size fl_fiber_switch_stack, .-fl_fiber_switch_stack\n"
    ".globl fl_fiber_start\n.hidden fl_fiber_start\n.type fl_fiber_start,@function\n"
    "fl_fiber_start:\n"
    "  movq %r12, %rdi\n  xorl %ebp, %ebp\n  call *%rbx\n  ud2\n"
    ".size fl_fiber_start, .-fl_fiber_start\n");

void fl_fiber_prepare(fl_fiber *fiber, void (*entry)(void *), void *argument) {
    void **top = (void **)((char *)fiber->stack + fiber->stack_size);
    // After the return address is popped the stack pointer is top - 16 bytes: aligned for the call.
    *--top = 0;
    *--top = 0;
    *--top = (void *)fl_fiber_start;
    *--top = 0;              // rbp
    *--top = (void *)entry;  // rbx
    *--top = argument;       // r12
    *--top = 0;
    *--top = 0;
    *--top = 0;
    fiber->stack_pointer = top;
}
#elif defined(__aarch64__)
// 160 bytes: x19..x30, d8..d15. `fl_fiber_start` finds entry in x19 and argument in x20.
__asm__(
    ".text\n.globl fl_fiber_switch_stack\n.hidden fl_fiber_switch_stack\n.type fl_fiber_switch_stack,%function\n"
    "fl_fiber_switch_stack:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n"
    ".size fl_fiber_switch_stack, .-fl_fiber_switch_stack\n"
    ".globl fl_fiber_start\n.hidden fl_fiber_start\n.type fl_fiber_start,%function\n"
    "fl_fiber_start:\n"
    "  mov x0, x20\n  mov x29, xzr\n  blr x19\n  brk #1\n"
    ".size fl_fiber_start, .-fl_fiber_start\n");

void fl_fiber_prepare(fl_fiber *fiber, void (*entry)(void *), void *argument) {
    void **frame = (void **)((char *)fiber->stack + fiber->stack_size - 160);
    for (int i = 0; i < 20; i++) frame[i] = 0;
    frame[0] = (void *)entry;
    frame[1] = argument;
    frame[11] = (void *)fl_fiber_start;  // x30
    fiber->stack_pointer = frame;
}
#else
#error "fibers are written for x86-64 and AArch64"
#endif

uint64_t fl_nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
