#define _GNU_SOURCE
#include "shared.h"

#if defined(__linux__) && defined(__x86_64__)

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

static void close_descriptor(fl_worker *w, int *fd, fl_kvm_answer *answer) {
    fl_answer(answer, fl_make(w, SYS_close, (uint64_t)(int64_t)*fd, 0, 0, 0, 0, 0));
    if (!answer->error) *fd = -1;
}

// MARK: VMs and vCPUs

/// A ring that is not there can be mapped, and not read.
static uint64_t ring_bytes(const fl_shared *all, int cpu) {
    uint64_t bytes = all->vms[all->cpus[cpu].vm].ring_bytes;
    return bytes ? bytes : fl_page;
}

static void create_vm(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    fl_vm *vm = &w->all->vms[call->subject];
    long fd = fl_ioctl(w, w->all->device, KVM_CREATE_VM, (void *)call->numbers[0]);
    fl_answer(answer, fd < 0 ? fd : 0);
    if (fd < 0) return;
    *vm = (fl_vm){.fd = (int)fd, .maker = w->process};
}

static void create_cpu(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    fl_vm *vm = &w->all->vms[call->numbers[0]];
    long fd = fl_ioctl(w, vm->fd, KVM_CREATE_VCPU, (void *)call->numbers[1]);
    fl_answer(answer, fd < 0 ? fd : 0);
    if (fd < 0) return;
    w->all->cpus[call->subject] = (fl_cpu){.fd = (int)fd, .vm = (int)call->numbers[0], .maker = w->process};
    if (vm->own_slot) return;
    // While the VM's descriptor is there: a vCPU may run without it.
    long failed = fl_own_slot(w, vm, 1);
    vm->own_error = failed < 0 ? (int)-failed : 0;
    struct kvm_enable_cap enable = {.cap = KVM_CAP_EXIT_ON_EMULATION_FAILURE, .args = {1}};
    // Older than 5.15: then a guest that fetches from nowhere ends otherwise.
    fl_ioctl(w, vm->fd, KVM_ENABLE_CAP, &enable);
}

static void close_cpu(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    int number = call->subject;
    close_descriptor(w, &w->all->cpus[number].fd, answer);
    if (answer->error) return;
    if (w->runs[number]) fl_make(w, SYS_munmap, (uint64_t)w->runs[number], fl_page, 0, 0, 0, 0);
    if (w->rings[number])
        fl_make(w, SYS_munmap, (uint64_t)w->rings[number], ring_bytes(w->all, number), 0, 0, 0, 0);
    w->runs[number] = 0;
    w->rings[number] = 0;
}

// MARK: Slots and logs

static fl_slot *slot_of(fl_shared *all, int vm, uint32_t number) {
    for (uint32_t i = 0; i < all->slot_count; i++)
        if (all->slots[i].vm == vm && all->slots[i].number == number) return &all->slots[i];
    return 0;
}

static int has_slots(const fl_shared *all, int vm) {
    for (uint32_t i = 0; i < all->slot_count; i++)
        if (all->slots[i].vm == vm) return 1;
    return 0;
}

static void note_slot(fl_shared *all, int vm, uint32_t number, uint64_t pages) {
    fl_slot *slot = slot_of(all, vm, number);
    if (!pages) {
        if (slot) *slot = all->slots[--all->slot_count];
    } else if (slot) {
        slot->pages = pages;
    } else if (all->slot_count < fl_kvm_most_slots) {
        all->slots[all->slot_count++] = (fl_slot){.vm = vm, .number = number, .pages = pages};
    }
}

static void set_region(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    fl_shared *all = w->all;
    const uint64_t *n = call->numbers;
    if (fl_is_own(w, n[4], n[3])) {
        fl_fail(answer, fl_kvm_own_memory, 0);
        return;
    }
    // More pages than a slot may have the kernel refuses before it makes tables, and tables for which it has no memory.
    uint64_t pages = n[3] / fl_page;
    int is_refused = pages > INT32_MAX || (all->refused_pages && pages > all->refused_pages);
    if (pages > all->options.slot_pages && !is_refused) {
        fl_fail(answer, fl_kvm_too_large, 0);
        return;
    }
    if (all->slot_count == fl_kvm_most_slots) {
        fl_fail(answer, fl_kvm_no_room, 0);
        return;
    }
    struct kvm_userspace_memory_region2 region = {
        .slot = (uint32_t)n[0], .flags = (uint32_t)n[1], .guest_phys_addr = n[2], .memory_size = n[3],
        .userspace_addr = n[4], .guest_memfd_offset = n[5],
    };
    region.guest_memfd = n[6] < fl_kvm_most ? (uint32_t)all->memfds[n[6]] : UINT32_MAX;
    // The older structure is the newer one's beginning.
    int is_second = call->operation == fl_kvm_set_region2;
    uint32_t request = is_second ? KVM_SET_USER_MEMORY_REGION2 : KVM_SET_USER_MEMORY_REGION;
    fl_answer(answer, fl_ioctl(w, all->vms[call->subject].fd, request, &region));
    if (!answer->error) note_slot(all, call->subject, region.slot, region.memory_size / fl_page);
}

static void get_log(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    struct kvm_dirty_log log = {.slot = (uint32_t)call->numbers[0]};
    if (call->numbers[1]) {
        fl_slot *slot = slot_of(w->all, call->subject, log.slot);
        // Never null, even for a slot that is not there.
        log.dirty_bitmap = fl_take_words(w, answer, slot ? (slot->pages + 63) / 64 : 0);
        if (!log.dirty_bitmap) return;
    }
    fl_answer(answer, fl_ioctl(w, w->all->vms[call->subject].fd, KVM_GET_DIRTY_LOG, &log));
    if (answer->error) answer->words = 0;
}

static void clear_log(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    struct kvm_clear_dirty_log log = {
        .slot = (uint32_t)call->numbers[0], .first_page = call->numbers[1], .num_pages = (uint32_t)call->numbers[2],
    };
    if (call->special != fl_kvm_null) {
        // The kernel reads no more than the slot has.
        fl_slot *slot = slot_of(w->all, call->subject, log.slot);
        uint64_t pages = slot && slot->pages < log.num_pages ? slot->pages : slot ? log.num_pages : 0;
        uint64_t words = (pages + 63) / 64, given = call->words < words ? call->words : words;
        uint64_t *bitmap = fl_take_words(w, answer, words);
        if (!bitmap) return;
        answer->words = 0;
        if (call->special == fl_kvm_all_ones)
            memset(bitmap, 0xff, words * sizeof *bitmap);
        else
            memcpy(bitmap, w->all->input + call->first_word, given * sizeof *bitmap);
        log.dirty_bitmap = bitmap;
    }
    fl_answer(answer, fl_ioctl(w, w->all->vms[call->subject].fd, KVM_CLEAR_DIRTY_LOG, &log));
}

// MARK: Rings

static long map_ring(fl_worker *w, int number) {
    long at = fl_map_pages(
        w, w->all->cpus[number].fd, ring_bytes(w->all, number), KVM_DIRTY_LOG_PAGE_OFFSET * fl_page);
    if (at < 0) return at;
    w->rings[number] = (struct kvm_dirty_gfn *)at;
    return 0;
}

static int is_dirty(const struct kvm_dirty_gfn *entry) {
    uint32_t flags = __atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE);
    return (flags & (KVM_DIRTY_GFN_F_DIRTY | KVM_DIRTY_GFN_F_RESET)) == KVM_DIRTY_GFN_F_DIRTY;
}

static void collect_ring(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    fl_cpu *cpu = &w->all->cpus[call->subject];
    if (cpu->fd < 0) {
        fl_answer(answer, -EBADF);
        return;
    }
    long failed = w->rings[call->subject] ? 0 : map_ring(w, call->subject);
    if (failed < 0) {
        fl_answer(answer, failed);
        return;
    }
    struct kvm_dirty_gfn *ring = w->rings[call->subject];
    uint64_t flags;
    answer->signal = fl_access((uint64_t)&ring->flags, sizeof ring->flags, 0, &flags);
    if (answer->signal) return;
    uint32_t entries = (uint32_t)(w->all->vms[cpu->vm].ring_bytes / sizeof *ring), count = 0;
    while (count < entries && count < call->numbers[0] && is_dirty(&ring[(cpu->next + count) % entries])) count++;
    uint64_t *words = fl_take_words(w, answer, count * 2);
    if (!words) return;
    for (uint32_t i = 0; i < count; i++, cpu->next++) {
        struct kvm_dirty_gfn *entry = &ring[cpu->next % entries];
        words[2 * i] = entry->slot;
        words[2 * i + 1] = entry->offset;
        __atomic_fetch_or(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
    }
}

// MARK: Capabilities, statistics, private memory

static void enable_cap(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    fl_vm *vm = &w->all->vms[call->subject];
    struct kvm_enable_cap enable = {.cap = (uint32_t)call->numbers[0], .flags = (uint32_t)call->numbers[1]};
    memcpy(enable.args, call->numbers + 2, sizeof enable.args);
    // It is refused where there are slots: the executor's own doesn't count.
    int is_hidden = enable.cap == KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP && vm->own_slot && vm->maker == w->process &&
                    !has_slots(w->all, call->subject);
    if (is_hidden) fl_own_slot(w, vm, 0);
    fl_answer(answer, fl_ioctl(w, vm->fd, KVM_ENABLE_CAP, &enable));
    if (is_hidden) {
        long failed = fl_own_slot(w, vm, 1);
        vm->own_error = failed < 0 ? (int)-failed : 0;
    }
    if (answer->error) return;
    if (enable.cap == KVM_CAP_DIRTY_LOG_RING || enable.cap == KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
        vm->ring_bytes = (uint32_t)enable.args[0];
}

enum { statistics_words = 1 << 13 };

static void statistics(fl_worker *w, int of, fl_kvm_answer *answer) {
    long fd = fl_ioctl(w, of, KVM_GET_STATS_FD, 0);
    fl_answer(answer, fd < 0 ? fd : 0);
    if (fd < 0) return;
    uint64_t *words = fl_take_words(w, answer, statistics_words);
    if (words) {
        long bytes = fl_make(w, SYS_pread64, (uint64_t)fd, (uint64_t)words, statistics_words * 8, 0, 0, 0);
        answer->words = bytes < 0 ? 0 : (uint32_t)((bytes + 7) / 8);
        if (bytes < 0) fl_answer(answer, bytes);
    }
    fl_plain(SYS_close, (uint64_t)fd, 0, 0, 0, 0, 0);
}

static void create_memfd(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    struct kvm_create_guest_memfd request = {.size = call->numbers[1], .flags = call->numbers[2]};
    long fd = fl_ioctl(w, w->all->vms[call->subject].fd, KVM_CREATE_GUEST_MEMFD, &request);
    fl_answer(answer, fd < 0 ? fd : 0);
    if (fd >= 0) w->all->memfds[call->numbers[0]] = (int)fd;
}

static void prefault(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    const uint64_t *n = call->numbers;
    struct kvm_pre_fault_memory request = {.gpa = n[0], .size = n[1], .flags = n[2]};
    fl_answer(answer, fl_ioctl(w, w->all->cpus[call->subject].fd, KVM_PRE_FAULT_MEMORY, &request));
    answer->fields[0] = request.gpa;
    answer->fields[1] = request.size;
}

void fl_kvm_step(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    fl_shared *all = w->all;
    const uint64_t *n = call->numbers;
    switch (call->operation) {
    case fl_kvm_create_vm: create_vm(w, call, answer); return;
    case fl_kvm_create_cpu: create_cpu(w, call, answer); return;
    case fl_kvm_close_vm: close_descriptor(w, &all->vms[call->subject].fd, answer); return;
    case fl_kvm_close_cpu: close_cpu(w, call, answer); return;
    case fl_kvm_close_memfd: close_descriptor(w, &all->memfds[call->subject], answer); return;
    case fl_kvm_set_region:
    case fl_kvm_set_region2: set_region(w, call, answer); return;
    case fl_kvm_get_log: get_log(w, call, answer); return;
    case fl_kvm_clear_log: clear_log(w, call, answer); return;
    case fl_kvm_enable_cap: enable_cap(w, call, answer); return;
    case fl_kvm_check_extension: {
        int of = call->subject < 0 ? all->device : all->vms[call->subject].fd;
        fl_answer(answer, fl_ioctl(w, of, KVM_CHECK_EXTENSION, (void *)n[0]));
        return;
    }
    case fl_kvm_create_memfd: create_memfd(w, call, answer); return;
    case fl_kvm_allocate:
        fl_answer(
            answer,
            fl_make(w, SYS_fallocate, (uint64_t)(int64_t)all->memfds[call->subject], n[0], n[1], n[2], 0, 0));
        return;
    case fl_kvm_set_attributes: {
        struct kvm_memory_attributes request = {.address = n[0], .size = n[1], .attributes = n[2], .flags = n[3]};
        fl_answer(answer, fl_ioctl(w, all->vms[call->subject].fd, KVM_SET_MEMORY_ATTRIBUTES, &request));
        return;
    }
    case fl_kvm_prefault: prefault(w, call, answer); return;
    case fl_kvm_collect_ring: collect_ring(w, call, answer); return;
    case fl_kvm_reset_rings:
        fl_answer(answer, fl_ioctl(w, all->vms[call->subject].fd, KVM_RESET_DIRTY_RINGS, 0));
        return;
    case fl_kvm_no_argument: fl_answer(answer, fl_ioctl(w, all->vms[call->subject].fd, (uint32_t)n[0], 0)); return;
    case fl_kvm_statistics: statistics(w, all->vms[call->subject].fd, answer); return;
    case fl_kvm_cpu_statistics: statistics(w, all->cpus[call->subject].fd, answer); return;
    }
    fl_answer(answer, -ENOSYS);
}

#endif
