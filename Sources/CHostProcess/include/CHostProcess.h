// Real processes of this machine's kernel that do what they are told: the other side of HostConformance. Linux only.
//
// A keeper process, forked once, forks a first process for each sequence; processes fork others. Each has a channel in
// shared memory. What a process does wrong it survives: SIGSEGV and SIGBUS are caught and reported.
#pragma once
#include <stdint.h>

enum {
    fl_host_processes = 4,
    fl_host_files = 3,
    /// The number, as `file` of a mapping, of secret memory that each sequence has anew.
    fl_host_secret = fl_host_files,
    fl_host_secret_pages = 16,
    /// The window of addresses in which everything happens, the same in each process.
    fl_host_pages = 64,
};
#define FL_HOST_BASE 0x100000000000ull

enum {
    fl_host_map = 1,
    fl_host_unmap,
    fl_host_protect,
    fl_host_advise,
    fl_host_load,
    fl_host_store,
    fl_host_fork,
    fl_host_remap,
};

typedef struct fl_host_call {
    uint32_t operation;
    /// -1: none.
    int32_t file;
    uint64_t address;
    uint64_t length;
    /// map, protect: PROT_*; advise: the advice; load and store: bytes, 1 to 8; fork: the child's number.
    uint64_t argument;
    /// map: MAP_*; store: the value; remap: the new length.
    uint64_t value;
    /// map: the offset in the file, in bytes; remap: the new address.
    uint64_t offset;
    /// remap: MREMAP_*.
    uint64_t flags;
} fl_host_call;

typedef struct fl_host_answer {
    /// 0, or an errno.
    int32_t error;
    /// SIGSEGV, SIGBUS, or 0.
    int32_t signal;
    uint64_t value;
} fl_host_answer;

typedef struct fl_host fl_host;

/// Starts the keeper, on one processor with the calling thread, so that what the kernel keeps for each processor is the
/// same for all. Null, and errno, if it can't.
fl_host *fl_host_start(void);
void fl_host_stop(fl_host *host);
/// 1: the processes have a swap device of their own: compressed memory, which the keeper makes where it is root and no swap
/// is active, and removes when it ends, however it does. 0: there is no swap. -1: somebody else's is active.
int fl_host_has_swap(const fl_host *host);

/// 1: there is secret memory (memfd_secret).
int fl_host_has_secret(const fl_host *host);

/// Ends all processes of the last sequence, makes the files empty, and starts process 0. 0, or an errno.
int fl_host_begin(fl_host *host);
/// Lets `process` do `call`. 0, or an errno of the harness: ESRCH when it is gone, ETIMEDOUT when it says nothing.
int fl_host_do(fl_host *host, int process, const fl_host_call *call, fl_host_answer *answer);
/// Ends one process.
void fl_host_end(fl_host *host, int process);

/// The pagemap entries of the window. 0, or an errno.
int fl_host_pagemap(fl_host *host, int process, uint64_t entries[fl_host_pages]);
/// What /proc/PID/smaps says of the area of a page.
enum {
    fl_area_read = 1,
    fl_area_write = 2,
    fl_area_execute = 4,
    fl_area_shared = 8,
    fl_area_accounted = 16,
    fl_area_huge = 32,
    fl_area_no_huge = 64,
    fl_area_mergeable = 128,
    fl_area_guarded = 256,
    fl_area_locked = 512,
    /// The page is its first.
    fl_area_first = 1024,
    fl_area_mapped = 2048,
};
/// For each page of the window `fl_area_*` bits, 0 where nothing is mapped. 0, or an errno.
int fl_host_areas(fl_host *host, int process, uint16_t areas[fl_host_pages]);

/// The descriptor of file `number`, shared by all.
int fl_host_file(fl_host *host, int number);
/// 0, or an errno.
int fl_host_truncate(fl_host *host, int number, uint64_t bytes);
int fl_host_punch(fl_host *host, int number, uint64_t offset, uint64_t length);
/// Reads or writes up to 8 bytes; returns how many, or minus an errno.
int fl_host_read_file(fl_host *host, int number, uint64_t offset, int bytes, uint64_t *value);
int fl_host_write_file(fl_host *host, int number, uint64_t offset, int bytes, uint64_t value);
