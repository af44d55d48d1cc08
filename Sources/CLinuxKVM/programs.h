// What the guest executes: programs that make the same access again and again, and end with a write to a port.
#pragma once
#include <stdint.h>

enum { fl_program_port = 0x10, fl_program_bytes = 64 };

/// In: r8 the first address, r9 the stride, r11 how many, rax the value to write, rdi where 8 bytes of each value read go.
/// Out: r10, from 0, how many accesses were made. `bytes` is 1, 2, 4 or 8.
uint64_t fl_program_offset(int writes, uint64_t bytes);
/// All programs, as they lie behind one another.
void fl_copy_programs(uint8_t *page);
