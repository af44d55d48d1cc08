// What a vCPU's run leaves in the page that it shares with the program.
#pragma once
#include <stddef.h>
#include <stdint.h>

enum {
    KVM_EXIT_UNKNOWN = 0,
    KVM_EXIT_IO = 2,
    KVM_EXIT_HLT = 5,
    KVM_EXIT_MMIO = 6,
    KVM_EXIT_SHUTDOWN = 8,
    KVM_EXIT_FAIL_ENTRY = 9,
    KVM_EXIT_INTR = 10,
    KVM_EXIT_INTERNAL_ERROR = 17,
    KVM_EXIT_DIRTY_RING_FULL = 31,
    KVM_EXIT_MEMORY_FAULT = 39,
};

enum {
    KVM_EXIT_IO_IN = 0,
    KVM_EXIT_IO_OUT = 1,
    KVM_INTERNAL_ERROR_EMULATION = 1,
};

static const uint64_t KVM_MEMORY_EXIT_FLAG_PRIVATE = UINT64_C(1) << 3;

/// The first 288 bytes of the shared page, x86's names. What follows is about registers.
struct kvm_run {
    // In.
    uint8_t request_interrupt_window;
    uint8_t immediate_exit;
    uint8_t padding1[6];
    // Out.
    uint32_t exit_reason;
    uint8_t ready_for_interrupt_injection;
    uint8_t if_flag;
    uint16_t flags;
    // In and out.
    uint64_t cr8;
    uint64_t apic_base;
    /// By `exit_reason`.
    union {
        struct {
            uint8_t direction;
            uint8_t size;  ///< bytes
            uint16_t port;
            uint32_t count;
            uint64_t data_offset;  ///< from the beginning of the page
        } io;
        struct {
            uint64_t phys_addr;
            uint8_t data[8];
            uint32_t len;
            uint8_t is_write;
        } mmio;
        struct {
            uint32_t suberror;
            uint32_t ndata;
            uint64_t data[16];
        } internal;
        struct {
            uint64_t flags;
            uint64_t gpa;
            uint64_t size;
        } memory_fault;
        char padding[256];
    };
};
_Static_assert(offsetof(struct kvm_run, exit_reason) == 8, "layout");
_Static_assert(offsetof(struct kvm_run, io) == 32, "layout");
_Static_assert(sizeof(struct kvm_run) == 288, "size");
