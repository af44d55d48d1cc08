#define _GNU_SOURCE
#include "programs.h"
#include "shared.h"

#if defined(__linux__) && defined(__x86_64__)

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

enum { own_pages = fl_kvm_own_bytes / fl_page };

enum { values_of_a_run = fl_page / 8, trap_flag = 0x100 };

static uint64_t own_address(const fl_worker *w, int page) { return w->all->place.guest_address + (uint64_t)page * fl_page; }

// MARK: The guest's page tables

// Present, writable, for user mode, accessed; of a leaf also dirty: the processor has nothing to write.
enum { table_bits = 0x27, leaf_bits = 0x67, large_bit = 0x80 };
#define LARGE (UINT64_C(2) << 20)

/// Where the guest has the guest address: there, sign-extended.
static uint64_t virtual_address(uint64_t address) { return (uint64_t)((int64_t)(address << 16) >> 16); }

static uint64_t *table_at(const fl_worker *w, uint64_t entry) {
    return (uint64_t *)(w->own_memory + ((entry & UINT64_C(0xffffffffff000)) - w->all->place.guest_address));
}

/// Maps the 2 MiB around a guest address; 0: there is no page left for a table.
static int map_address(fl_worker *w, uint64_t address) {
    uint64_t *table = (uint64_t *)(w->own_memory + fl_kvm_own_root * fl_page);
    for (int shift = 39; shift > 21; shift -= 9) {
        uint64_t *entry = &table[address >> shift & 511];
        if (!*entry) {
            if (w->own_tables == own_pages) return 0;
            *entry = own_address(w, (int)w->own_tables++) | table_bits;
        }
        table = table_at(w, *entry);
    }
    // Entries are made and never changed: no processor need forget one.
    uint64_t *leaf = &table[address >> 21 & 511];
    if (!*leaf) *leaf = (address & ~(LARGE - 1)) | leaf_bits | large_bit;
    return 1;
}

/// Page tables with nothing but the own slot in them. Slots that showed the old ones are made anew.
static void begin_tables(fl_worker *w) {
    memset(w->own_memory + fl_kvm_own_root * fl_page, 0, (own_pages - fl_kvm_own_root) * fl_page);
    w->own_tables = fl_kvm_own_tables;
    w->own_age++;
    map_address(w, own_address(w, 0));
}

// MARK: The executor's own slot

static long make_own_memory(fl_worker *w) {
    if (w->own_memory) return 0;
    long at = fl_map_pages(w, -1, fl_kvm_own_bytes, UINT64_MAX);
    if (at < 0) return at;
    w->own_memory = (uint8_t *)at;
    fl_copy_programs(w->own_memory + fl_kvm_own_code * fl_page);
    begin_tables(w);
    return 0;
}

long fl_own_slot(fl_worker *w, fl_vm *vm, int exists) {
    long failed = make_own_memory(w);
    if (failed < 0) return failed;
    struct kvm_userspace_memory_region region = {
        .slot = w->all->place.slot, .guest_phys_addr = own_address(w, 0), .memory_size = exists ? fl_kvm_own_bytes : 0,
        .userspace_addr = (uint64_t)w->own_memory,
    };
    failed = fl_ioctl(w, vm->fd, KVM_SET_USER_MEMORY_REGION, &region);
    vm->own_slot = exists && failed >= 0 ? w->own_age : 0;
    return failed;
}

/// The slot is there, and no processor knows older page tables.
static long refresh_own_slot(fl_worker *w, fl_vm *vm) {
    if (vm->own_slot == w->own_age) return 0;
    if (vm->own_slot) {
        long failed = fl_own_slot(w, vm, 0);
        if (failed < 0) return failed;
    }
    return fl_own_slot(w, vm, 1);
}

// MARK: The vCPU

static struct kvm_segment segment(uint16_t selector, uint8_t type, uint8_t privilege, int is_code) {
    return (struct kvm_segment){
        .limit = 0xffffffff, .selector = selector, .type = type, .present = 1, .dpl = privilege, .db = !is_code,
        .s = 1, .l = (uint8_t)is_code, .g = 1,
    };
}

/// 64-bit code, at privilege 3 where the processor executes it, at 0 where KVM's emulator does.
static long set_mode(fl_worker *w, fl_cpu *cpu, int mode) {
    if (cpu->mode == mode) return 0;
    cpu->mode = fl_mode_unknown;
    struct kvm_sregs s;
    long failed = fl_ioctl(w, cpu->fd, KVM_GET_SREGS, &s);
    if (failed < 0) return failed;
    int is_privileged = mode == fl_mode_privileged;
    uint8_t privilege = is_privileged ? 0 : 3;
    s.cs = segment(is_privileged ? 0x10 : 0x33, 0xb, privilege, 1);
    s.ss = s.ds = s.es = s.fs = s.gs = segment(is_privileged ? 0x18 : 0x2b, 0x3, privilege, 0);
    memset(&s.ldt, 0, sizeof s.ldt);
    s.ldt.unusable = 1;
    s.tr = (struct kvm_segment){.base = own_address(w, fl_kvm_own_task), .limit = 103, .selector = 8, .type = 0xb, .present = 1};
    // Nothing to deliver an exception with: one ends the run.
    memset(&s.gdt, 0, sizeof s.gdt);
    memset(&s.idt, 0, sizeof s.idt);
    s.gdt.base = s.idt.base = own_address(w, fl_kvm_own_task);
    s.cr0 = 0x80050033;
    s.cr2 = 0;
    s.cr3 = own_address(w, fl_kvm_own_root);
    s.cr4 = 0x20;
    s.efer = 0xd00;  // no system calls
    failed = fl_ioctl(w, cpu->fd, KVM_SET_SREGS, &s);
    if (failed < 0) return failed;
    cpu->mode = mode;
    return 0;
}

/// A system call, where the processor makes one all the same, goes where nothing is mapped. Intel SDM volume 4, LSTAR and
/// CSTAR.
static long set_call_targets(fl_worker *w, fl_cpu *cpu) {
    const uint64_t nowhere = UINT64_C(0xfffffffffffff000);
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entries[2];
    } targets = {{.nmsrs = 2}, {{.index = 0xc0000082, .data = nowhere}, {.index = 0xc0000083, .data = nowhere}}};
    return fl_ioctl(w, cpu->fd, KVM_SET_MSRS, &targets);
}

static long prepare_cpu(fl_worker *w, int number) {
    fl_shared *all = w->all;
    fl_cpu *cpu = &all->cpus[number];
    if (!w->runs[number]) {
        long at = fl_map_pages(w, cpu->fd, fl_page, 0);
        if (at < 0) return at;
        w->runs[number] = (struct kvm_run *)at;
    }
    if (cpu->ready) return 0;
    long failed = fl_ioctl(w, cpu->fd, KVM_SET_CPUID2, &all->cpuid);
    if (failed >= 0) failed = set_call_targets(w, cpu);
    if (failed < 0) return failed;
    cpu->ready = 1;
    return 0;
}

/// Ends what the last run left to its user to do: with no value for a read. Otherwise it would go into the next program.
static void finish_access(fl_worker *w, int number) {
    struct kvm_run *run = w->runs[number];
    if (run->exit_reason != KVM_EXIT_IO && run->exit_reason != KVM_EXIT_MMIO) return;
    uint32_t reason = run->exit_reason;
    if (reason == KVM_EXIT_MMIO && !run->mmio.is_write) memset(run->mmio.data, 0, sizeof run->mmio.data);
    run->immediate_exit = 1;
    fl_ioctl(w, w->all->cpus[number].fd, KVM_RUN, 0);
    run->immediate_exit = 0;
}

// MARK: Runs

typedef struct program {
    int kind;
    uint64_t address, bytes, count, stride, value;
    int mode;
} program;

/// Fills in what the run ended with.
static void note_exit(const struct kvm_run *run, long result, fl_kvm_answer *answer) {
    fl_answer(answer, result);
    uint32_t reason = run->exit_reason;
    answer->exit = result < 0 && reason == KVM_EXIT_UNKNOWN ? -1 : (int32_t)reason;
    switch (reason) {
    case KVM_EXIT_MMIO:
        answer->fields[0] = run->mmio.phys_addr;
        memcpy(&answer->fields[1], run->mmio.data, 8);
        if (run->mmio.len < 8) answer->fields[1] &= (UINT64_C(1) << run->mmio.len * 8) - 1;
        answer->fields[2] = run->mmio.len;
        answer->fields[3] = run->mmio.is_write;
        break;
    case KVM_EXIT_MEMORY_FAULT:
        answer->fields[0] = run->memory_fault.flags;
        answer->fields[1] = run->memory_fault.gpa;
        answer->fields[2] = run->memory_fault.size;
        break;
    case KVM_EXIT_INTERNAL_ERROR: answer->fields[0] = run->internal.suberror; break;
    }
}

static long run_cpu(fl_worker *w, int number, fl_kvm_answer *answer) {
    struct kvm_run *run = w->runs[number];
    run->exit_reason = KVM_EXIT_UNKNOWN;
    long result = fl_ioctl(w, w->all->cpus[number].fd, KVM_RUN, 0);
    note_exit(run, result, answer);
    finish_access(w, number);
    return result;
}

/// Whether the processor can name an address at all, and the same half of its addresses has it.
static int is_nameable(const fl_worker *w, uint64_t address, uint64_t bytes) {
    uint32_t width = w->all->guest_width < 48 ? w->all->guest_width : 48;
    return address + (bytes - 1) >= address && (address + (bytes - 1)) >> width == 0;
}

/// Whether all of the first million addresses are: a program is run as a whole or not at all.
static int are_nameable(const fl_worker *w, const program *p) {
    for (uint64_t i = 0; i < p->count && i < 1 << 20; i++)
        if (!is_nameable(w, p->address + i * p->stride, p->bytes)) return 0;
    return 1;
}

/// How many accesses from one on can be made in one run: those in a row whose addresses are mapped.
static uint64_t map_accesses(fl_worker *w, const program *p, uint64_t from, uint64_t most) {
    uint64_t first = p->address + from * p->stride;
    uint64_t count = 0;
    for (; count < most; count++) {
        uint64_t address = first + count * p->stride;
        if (!is_nameable(w, address, p->bytes) || (address ^ first) >> 47) break;
        if (!map_address(w, address)) break;
    }
    return count;
}

/// As `map_accesses`, after making room for tables if there is none: 0 only for an address that can't be named.
static long make_accessible(fl_worker *w, fl_vm *vm, const program *p, uint64_t from, uint64_t most) {
    uint64_t count = map_accesses(w, p, from, most);
    if (!count && is_nameable(w, p->address + from * p->stride, p->bytes)) {
        begin_tables(w);
        count = map_accesses(w, p, from, most);
    }
    long failed = refresh_own_slot(w, vm);
    return failed < 0 ? failed : (long)count;
}

static long set_registers(fl_worker *w, fl_cpu *cpu, struct kvm_regs *r) {
    // IOPL 3: a write to a port ends the run.
    r->rflags |= 0x3202;
    r->rsp = own_address(w, fl_kvm_own_scratch) + fl_page / 2;
    return fl_ioctl(w, cpu->fd, KVM_SET_REGS, r);
}

/// Reads or writes: up to a page of values with each run. Minus an errno: the set-up failed.
static long run_program(fl_worker *w, int number, const program *p, uint64_t *values, fl_kvm_answer *answer) {
    fl_cpu *cpu = &w->all->cpus[number];
    fl_vm *vm = &w->all->vms[cpu->vm];
    long failed;
    do {
        uint64_t most = p->count - answer->done < values_of_a_run ? p->count - answer->done : values_of_a_run;
        long count = p->count ? make_accessible(w, vm, p, answer->done, most) : refresh_own_slot(w, vm);
        if (count < 0) return count;
        if (!count && p->count) {
            fl_fail(answer, fl_kvm_beyond_width, 0);
            return 0;
        }
        if ((failed = set_mode(w, cpu, p->mode)) < 0) return failed;
        struct kvm_regs r = {
            .rax = p->value, .rdi = own_address(w, fl_kvm_own_values), .r9 = p->stride, .r11 = (uint64_t)count,
            .r8 = virtual_address(p->address + answer->done * p->stride),
            .rip = own_address(w, fl_kvm_own_code) + fl_program_offset(p->kind == fl_kvm_write_access, p->bytes),
        };
        if ((failed = set_registers(w, cpu, &r)) < 0) return failed;
        long result = run_cpu(w, number, answer);
        // Whose process it is not: the guest has not begun.
        if (result == -EIO) return 0;
        if ((failed = fl_ioctl(w, cpu->fd, KVM_GET_REGS, &r)) < 0) return failed;
        if (r.r10 > (uint64_t)count) r.r10 = 0;
        if (values) memcpy(values + answer->done, w->own_memory + fl_kvm_own_values * fl_page, r.r10 * 8);
        answer->done += r.r10;
        if (result < 0 || answer->exit != KVM_EXIT_IO) {
            if (answer->exit == KVM_EXIT_SHUTDOWN) cpu->mode = fl_mode_unknown;
            return 0;
        }
    } while (answer->done < p->count);
    return 0;
}

/// Whether an emulation failed after the instruction was there: its bytes are told, or the guest has gone on.
static int is_fetched(fl_worker *w, int number, const struct kvm_regs *before) {
    const struct kvm_run *run = w->runs[number];
    enum { has_bytes = 1 };
    if (run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION && run->internal.ndata && run->internal.data[0] & has_bytes)
        return 1;
    struct kvm_regs after;
    return fl_ioctl(w, w->all->cpus[number].fd, KVM_GET_REGS, &after) >= 0 && after.rip != before->rip;
}

/// Executes the instruction that lies at each address, whatever it is: the trap after it, or its own exception, ends the run
/// as a shutdown, since there is nothing to deliver one with. Its operands, if they are in memory, are in the scratch page.
static long run_code(fl_worker *w, int number, const program *p, fl_kvm_answer *answer) {
    fl_cpu *cpu = &w->all->cpus[number];
    long failed;
    for (; answer->done < p->count; answer->done++) {
        long count = make_accessible(w, &w->all->vms[cpu->vm], p, answer->done, 1);
        if (count < 0) return count;
        if (!count) {
            fl_fail(answer, fl_kvm_beyond_width, 0);
            return 0;
        }
        if ((failed = set_mode(w, cpu, p->mode)) < 0) return failed;
        uint64_t s = own_address(w, fl_kvm_own_scratch) + fl_page / 2;
        struct kvm_regs r = {
            .rax = s, .rbx = s, .rcx = s, .rdx = s, .rsi = s, .rdi = s, .rbp = s, .r8 = s, .r9 = s, .r10 = s, .r11 = s,
            .r12 = s, .r13 = s, .r14 = s, .r15 = s, .rflags = trap_flag,
            .rip = virtual_address(p->address + answer->done * p->stride),
        };
        if ((failed = set_registers(w, cpu, &r)) < 0) return failed;
        long result = run_cpu(w, number, answer);
        // Some processors begin anew after a shutdown.
        if (answer->exit == KVM_EXIT_SHUTDOWN) cpu->mode = fl_mode_unknown;
        if (result < 0) return 0;
        switch (answer->exit) {
        case KVM_EXIT_INTR:
        case KVM_EXIT_DIRTY_RING_FULL:
        case KVM_EXIT_MEMORY_FAULT:
        case KVM_EXIT_FAIL_ENTRY: return 0;
        case KVM_EXIT_INTERNAL_ERROR:
            if (!is_fetched(w, number, &r)) return 0;
        }
    }
    answer->exit = KVM_EXIT_IO;
    return 0;
}

void fl_guest_step(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    fl_shared *all = w->all;
    int number = call->subject;
    fl_cpu *cpu = &all->cpus[number];
    const uint64_t *n = call->numbers;
    if (cpu->fd < 0 || cpu->maker != w->process) {
        // The kernel says what it thinks of that.
        fl_answer(answer, fl_ioctl(w, cpu->fd, KVM_RUN, 0));
        return;
    }
    program p = {
        .kind = (int)n[0], .address = n[1], .bytes = n[2], .count = n[3], .stride = n[4], .value = n[5],
        .mode = n[6] ? fl_mode_privileged : fl_mode_native,
    };
    if (!are_nameable(w, &p)) {
        fl_fail(answer, fl_kvm_beyond_width, 0);
        return;
    }
    fl_vm *vm = &all->vms[cpu->vm];
    long failed = vm->own_error ? -vm->own_error : prepare_cpu(w, number);
    uint64_t *values = 0;
    if (failed >= 0 && p.kind == fl_kvm_read_access) {
        values = fl_take_words(w, answer, p.count);
        if (!values) return;
    }
    if (failed >= 0) {
        failed = p.kind == fl_kvm_exec_access ? run_code(w, number, &p, answer)
                                              : run_program(w, number, &p, values, answer);
    }
    answer->words = values ? (uint32_t)answer->done : 0;
    if (failed < 0) fl_fail(answer, fl_kvm_no_guest, failed);
}

#endif
