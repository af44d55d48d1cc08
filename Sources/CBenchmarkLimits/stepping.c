// Runs a function one instruction at a time and looks at the instructions that lock a line.
#define _GNU_SOURCE
#include "CBenchmarkLimits.h"

#if defined(__x86_64__) && defined(__linux__)
#include <signal.h>
#include <string.h>
#include <ucontext.h>

static limit_steps *told;

static uint64_t value_of(const greg_t *registers, int number) {
    static const int place[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return (uint64_t)registers[place[number]];
}

// The operand in memory of an instruction with a ModRM byte at `code`. Intel SDM volume 2, 2.1.3 to 2.1.5. `tail`: bytes of
// the instruction after it, for addresses relative to the next instruction. 0: the operand is a register.
static uint64_t operand(const uint8_t *code, int rex, int tail, const greg_t *registers) {
    int mode = code[0] >> 6, base = code[0] & 7;
    if (mode == 3) return 0;
    const uint8_t *next = code + 1;
    uint64_t address = 0;
    if (base == 4) {
        int scale = next[0] >> 6, index = (next[0] >> 3 & 7) | (rex & 2) << 2;
        base = next[0] & 7;
        next++;
        if (index != 4) address = value_of(registers, index) << scale;
        if (base != 5 || mode != 0) address += value_of(registers, base | (rex & 1) << 3);
        else mode = 2;
    } else if (base == 5 && mode == 0) {
        int32_t distance;
        memcpy(&distance, next, 4);
        return (uint64_t)(uintptr_t)(next + 4 + tail) + (uint64_t)(int64_t)distance;
    } else {
        address = value_of(registers, base | (rex & 1) << 3);
    }
    if (mode == 1) return address + (uint64_t)(int64_t)(int8_t)next[0];
    if (mode == 2) {
        int32_t distance;
        memcpy(&distance, next, 4);
        return address + (uint64_t)(int64_t)distance;
    }
    return address;
}

static void keep(uint64_t line) {
    told->locked++;
    for (uint32_t i = 0; i < told->lines; i++)
        if (told->line[i] == line) return;
    if (told->lines < sizeof told->line / sizeof told->line[0]) told->line[told->lines++] = line;
}

static void step(int number, siginfo_t *info, void *context) {
    (void)number, (void)info;
    const greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *code = (const uint8_t *)(uintptr_t)registers[REG_RIP];
    told->instructions++;
    int locked = 0, rex = 0;
    while (*code == 0xf0 || *code == 0x66 || *code == 0xf2 || *code == 0xf3) locked |= *code++ == 0xf0;
    if ((*code & 0xf0) == 0x40) rex = *code++ & 15;
    // XCHG with memory locks without the prefix.
    int exchanges = (*code == 0x86 || *code == 0x87) && code[1] >> 6 != 3;
    if (!locked && !exchanges) return;
    int tail = *code == 0x80 || *code == 0x83 || *code == 0xc0 || *code == 0xc1 ? 1 : *code == 0x81 ? 4 : 0;
    code += *code == 0x0f ? 2 : 1;
    keep(operand(code, rex, tail, registers) >> 6);
}

int limit_step(void (*body)(void *), void *context, limit_steps *steps) {
    struct sigaction action = {.sa_sigaction = step, .sa_flags = SA_SIGINFO | SA_NODEFER}, before;
    memset(steps, 0, sizeof *steps);
    told = steps;
    if (sigaction(SIGTRAP, &action, &before) != 0) return -1;
    __asm__ volatile("pushfq; orq $0x100, (%%rsp); popfq" ::: "memory", "cc");
    body(context);
    __asm__ volatile("pushfq; andq $~0x100, (%%rsp); popfq" ::: "memory", "cc");
    sigaction(SIGTRAP, &before, NULL);
    return 0;
}
#else
int limit_step(void (*body)(void *), void *context, limit_steps *steps) {
    (void)body, (void)context, (void)steps;
    return -1;
}
#endif
