#include "programs.h"
#include "CLinuxKVM.h"

#if defined(__linux__) && defined(__x86_64__)

#include <string.h>

// Each program takes 64 bytes: reads of 1, 2, 4 and 8 bytes, then writes.
#define READ(access) ENTER access "\n mov %rax, (%rdi,%r10,8)\n" LEAVE
#define WRITE(access) ENTER access "\n" LEAVE
#define ENTER ".balign 64, 0x90\n 1: cmp %r11, %r10\n jae 2f\n"
#define LEAVE "add %r9, %r8\n inc %r10\n jmp 1b\n 2: out %al, $0x10\n jmp 2b\n"

__asm__(
    ".pushsection .rodata\n"
    ".balign 64\n"
    ".hidden fl_programs\n .globl fl_programs\n fl_programs:\n"
    READ("movzbl (%r8), %eax")
    READ("movzwl (%r8), %eax")
    READ("movl (%r8), %eax")
    READ("movq (%r8), %rax")
    WRITE("movb %al, (%r8)")
    WRITE("movw %ax, (%r8)")
    WRITE("movl %eax, (%r8)")
    WRITE("movq %rax, (%r8)")
    ".balign 64, 0x90\n"
    ".hidden fl_programs_end\n .globl fl_programs_end\n fl_programs_end:\n"
    ".popsection\n");

extern const uint8_t fl_programs[], fl_programs_end[];

static uint64_t index_of(uint64_t bytes) { return bytes == 8 ? 3 : bytes >> 1; }

uint64_t fl_program_offset(int writes, uint64_t bytes) {
    return (index_of(bytes) + (writes ? 4 : 0)) * fl_program_bytes;
}

fl_kvm_program fl_kvm_program_of(int writes, uint64_t bytes) {
    fl_kvm_program found = {.first = fl_program_offset(writes, bytes)};
    // A comparison and a jump come first.
    found.access = found.out = found.first + 5;
    while (fl_programs[found.out] != 0xe6 || fl_programs[found.out + 1] != fl_program_port) found.out++;
    return found;
}

void fl_copy_programs(uint8_t *page) { memcpy(page, fl_programs, (size_t)(fl_programs_end - fl_programs)); }

#else

fl_kvm_program fl_kvm_program_of(int writes, uint64_t bytes) {
    (void)writes, (void)bytes;
    return (fl_kvm_program){0};
}

#endif
