#define _GNU_SOURCE
#include "shared.h"

#if defined(__linux__) && defined(__x86_64__)

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/if_packet.h>
#include <linux/memfd.h>
#include <linux/perf_event.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>

// Newer than some C libraries' headers.
enum { memfd_secret_number = 447, map_fixed_noreplace = 0x100000 };

int fl_is_own(const fl_worker *w, uint64_t address, uint64_t length) {
    const uint64_t end = UINT64_C(1) << 47;
    uint64_t last = address + length;
    // What wraps, or begins beyond, the kernel refuses.
    if (length == 0 || last < address || address >= end) return 0;
    return last > w->all->own_low || address < w->all->own_below;
}

// MARK: What stands behind a region

static long make_memfd(fl_worker *w, uint64_t flags) {
    return fl_make(w, SYS_memfd_create, (uint64_t)"faultline", MFD_CLOEXEC | flags, 0, 0, 0, 0);
}

/// A file without a name.
static long make_file(fl_worker *w) {
    const char *folders[] = {"/var/tmp", "/tmp"};
    long fd = -ENOENT;
    for (int i = 0; i < 2; i++) {
        fd = fl_make(w, SYS_open, (uint64_t)folders[i], O_TMPFILE | O_RDWR | O_CLOEXEC, 0600, 0, 0, 0);
        if (fd >= 0) break;
    }
    return fd;
}

static long make_event(fl_worker *w) {
    struct perf_event_attr event;
    memset(&event, 0, sizeof event);
    event.size = sizeof event;
    event.type = PERF_TYPE_SOFTWARE;
    event.config = PERF_COUNT_SW_DUMMY;
    event.exclude_kernel = 1;
    // Of this process, on any processor, in no group.
    return fl_make(w, SYS_perf_event_open, (uint64_t)&event, 0, UINT64_MAX, UINT64_MAX, PERF_FLAG_FD_CLOEXEC, 0);
}

static long make_packets(fl_worker *w, uint64_t bytes) {
    long fd = fl_make(w, SYS_socket, AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0, 0, 0, 0);
    if (fd < 0) return fd;
    struct tpacket_req ring = {
        .tp_block_size = fl_page,
        .tp_block_nr = (unsigned)(bytes / fl_page),
        .tp_frame_size = fl_page,
        .tp_frame_nr = (unsigned)(bytes / fl_page),
    };
    long failed = fl_make(
        w, SYS_setsockopt, (uint64_t)fd, SOL_PACKET, PACKET_RX_RING, (uint64_t)&ring, sizeof ring, 0);
    if (failed >= 0) return fd;
    fl_plain(SYS_close, (uint64_t)fd, 0, 0, 0, 0, 0);
    return failed;
}

/// The descriptor of what a kind of memory needs; minus an errno.
static long make_object(fl_worker *w, uint32_t kind, uint64_t bytes) {
    switch (kind) {
    case fl_kvm_kind_memfd:
    case fl_kvm_kind_memfd_private: return make_memfd(w, 0);
    case fl_kvm_kind_hugetlb:
    case fl_kvm_kind_hugetlb_private: return make_memfd(w, MFD_HUGETLB | MFD_HUGE_2MB);
    case fl_kvm_kind_file:
    case fl_kvm_kind_file_private: return make_file(w);
    case fl_kvm_kind_secret: return fl_make(w, memfd_secret_number, O_CLOEXEC, 0, 0, 0, 0, 0);
    case fl_kvm_kind_perf_ring: return make_event(w);
    case fl_kvm_kind_packet_ring: return make_packets(w, bytes);
    }
    return -EINVAL;
}

static int is_shared(uint32_t kind) {
    switch (kind) {
    case fl_kvm_kind_anonymous:
    case fl_kvm_kind_memfd_private:
    case fl_kvm_kind_file_private:
    case fl_kvm_kind_hugetlb_private: return 0;
    }
    return 1;
}

static int has_size(uint32_t kind) { return kind != fl_kvm_kind_perf_ring && kind != fl_kvm_kind_packet_ring; }

static void make_region(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    fl_region *region = &w->all->regions[call->subject];
    uint32_t kind = (uint32_t)call->numbers[1];
    uint64_t address = call->numbers[0], bytes = call->numbers[2], flags = map_fixed_noreplace;
    if (kind == fl_kvm_kind_none) return;
    region->kind = kind;
    if (kind == fl_kvm_kind_anonymous || kind == fl_kvm_kind_shared_anonymous) {
        flags |= MAP_ANONYMOUS;
    } else {
        long fd = make_object(w, kind, bytes);
        if (fd < 0) {
            fl_fail(answer, fl_kvm_no_such_memory, fd);
            return;
        }
        region->fd = (int)fd;
        long failed = has_size(kind) ? fl_make(w, SYS_ftruncate, (uint64_t)fd, bytes, 0, 0, 0, 0) : 0;
        if (failed < 0) {
            fl_answer(answer, failed);
            return;
        }
    }
    flags |= is_shared(kind) ? MAP_SHARED : MAP_PRIVATE;
    long at = fl_make(
        w, SYS_mmap, address, bytes, call->numbers[3], flags, (uint64_t)(int64_t)region->fd, 0);
    fl_answer(answer, at < 0 ? at : 0);
}

// MARK: The process's own accesses

/// Ends at the first signal.
static void access_words(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    int stores = call->operation == fl_kvm_store;
    uint64_t address = call->numbers[0], count = call->numbers[1], stride = call->numbers[2];
    uint64_t *values = 0;
    if (!stores) {
        values = fl_take_words(w, answer, count);
        if (!values) return;
    }
    for (; answer->done < count; answer->done++, address += stride) {
        if (fl_is_own(w, address, 8)) {
            fl_fail(answer, fl_kvm_own_memory, 0);
            break;
        }
        uint64_t value = call->numbers[3];
        answer->signal = fl_access(address, 8, stores, &value);
        if (answer->signal) break;
        if (!stores) values[answer->done] = value;
    }
    if (!stores) answer->words = (uint32_t)answer->done;
}

/// The kernel keeps pages whose age changes in batches, one for each processor, with a reference on each until it empties
/// them; every advice about age empties them first.
static void empty_batches(void) {
    static char page[fl_page] __attribute__((aligned(fl_page)));
    fl_plain(SYS_madvise, (uint64_t)page, sizeof page, MADV_COLD, 0, 0, 0);
}

// The pipe of this process, which holds a reference to each page that is put into it.
static int held[2] = {-1, -1};

static long splice_page(fl_worker *w, uint64_t address) {
    if (held[0] < 0) {
        long failed = fl_make(w, SYS_pipe2, (uint64_t)held, O_NONBLOCK | O_CLOEXEC, 0, 0, 0, 0);
        if (failed < 0) return failed;
    }
    struct iovec page = {.iov_base = (void *)address, .iov_len = fl_page};
    return fl_make(w, SYS_vmsplice, (uint64_t)held[1], (uint64_t)&page, 1, SPLICE_F_NONBLOCK, 0, 0);
}

/// In a process that was forked: the descriptors are its parent's.
void fl_forget_pipe(void) { held[0] = held[1] = -1; }

void fl_drain(void) {
    for (int i = 0; i < 2; i++) {
        if (held[i] >= 0) fl_plain(SYS_close, (uint64_t)held[i], 0, 0, 0, 0, 0);
        held[i] = -1;
    }
}

static int reaches_own(const fl_worker *w, const fl_kvm_call *call) {
    const uint64_t *n = call->numbers;
    switch (call->operation) {
    case fl_kvm_map:
    case fl_kvm_unmap:
    case fl_kvm_protect:
    case fl_kvm_advise: return fl_is_own(w, n[0], n[1]);
    case fl_kvm_splice: return fl_is_own(w, n[0], fl_page);
    case fl_kvm_remap: return fl_is_own(w, n[0], n[1]) || fl_is_own(w, n[3] ? n[4] : n[0], n[2]);
    }
    return 0;
}

void fl_host_step(fl_worker *w, const fl_kvm_call *call, fl_kvm_answer *answer) {
    const uint64_t *n = call->numbers;
    if (reaches_own(w, call)) {
        fl_fail(answer, fl_kvm_own_memory, 0);
        return;
    }
    int fd = call->subject < 0 ? -1 : w->all->regions[call->subject].fd;
    uint64_t file = (uint64_t)(int64_t)fd;
    long result = 0;
    switch (call->operation) {
    case fl_kvm_host: make_region(w, call, answer); return;
    case fl_kvm_load:
    case fl_kvm_store: access_words(w, call, answer); return;
    case fl_kvm_map: result = fl_make(w, SYS_mmap, n[0], n[1], n[2], n[3], file, n[4]); break;
    case fl_kvm_unmap: result = fl_make(w, SYS_munmap, n[0], n[1], 0, 0, 0, 0); break;
    case fl_kvm_protect: result = fl_make(w, SYS_mprotect, n[0], n[1], n[2], 0, 0, 0); break;
    case fl_kvm_advise:
        result = fl_make(w, SYS_madvise, n[0], n[1], n[2], 0, 0, 0);
        empty_batches();
        break;
    case fl_kvm_remap: result = fl_make(w, SYS_mremap, n[0], n[1], n[2], n[3], n[4], 0); break;
    case fl_kvm_truncate: result = fl_make(w, SYS_ftruncate, file, n[0], 0, 0, 0, 0); break;
    case fl_kvm_punch:
        result = fl_make(w, SYS_fallocate, file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, n[0], n[1], 0, 0);
        break;
    case fl_kvm_splice: result = splice_page(w, n[0]); break;
    case fl_kvm_drain: fl_drain(); break;
    default: result = -ENOSYS;
    }
    // Of an address nobody wants to know more than that there is one.
    fl_answer(answer, result < 0 ? result : 0);
}

#endif
