// A vCPU of x86: what its user sets before it runs.
#pragma once
#include "kvm_numbers.h"
#include <stddef.h>
#include <stdint.h>

/// KVM_GET_REGS, KVM_SET_REGS.
struct kvm_regs {
    uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp;
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
    uint64_t rip, rflags;
};
_Static_assert(sizeof(struct kvm_regs) == 144, "size");

struct kvm_segment {
    uint64_t base;
    uint32_t limit;
    uint16_t selector;
    uint8_t type;  ///< of its descriptor
    uint8_t present, dpl, db, s, l, g, avl;
    uint8_t unusable;
    uint8_t padding;
};
_Static_assert(sizeof(struct kvm_segment) == 24, "size");

struct kvm_dtable {
    uint64_t base;
    uint16_t limit;
    uint16_t padding[3];
};

/// KVM_GET_SREGS, KVM_SET_SREGS.
struct kvm_sregs {
    struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt;
    struct kvm_dtable gdt, idt;
    uint64_t cr0, cr2, cr3, cr4, cr8;
    uint64_t efer;
    uint64_t apic_base;
    uint64_t interrupt_bitmap[4];
};
_Static_assert(sizeof(struct kvm_sregs) == 312, "size");

struct kvm_cpuid_entry2 {
    uint32_t function, index, flags;
    uint32_t eax, ebx, ecx, edx;
    uint32_t padding[3];
};
_Static_assert(sizeof(struct kvm_cpuid_entry2) == 40, "size");

/// KVM_GET_SUPPORTED_CPUID, KVM_SET_CPUID2: `nent` entries follow.
struct kvm_cpuid2 {
    uint32_t nent;
    uint32_t padding;
};

/// KVM_SET_MSRS: `nmsrs` entries follow; the call returns how many it has set.
struct kvm_msrs {
    uint32_t nmsrs;
    uint32_t pad;
};

struct kvm_msr_entry {
    uint32_t index;
    uint32_t reserved;
    uint64_t data;
};
_Static_assert(sizeof(struct kvm_msr_entry) == 16, "size");

// Of the device.
static const uint32_t KVM_GET_SUPPORTED_CPUID = FL_IN_OUT(0x05, struct kvm_cpuid2);
// Of a vCPU.
static const uint32_t KVM_GET_REGS = FL_OUT(0x81, struct kvm_regs);
static const uint32_t KVM_SET_REGS = FL_IN(0x82, struct kvm_regs);
static const uint32_t KVM_GET_SREGS = FL_OUT(0x83, struct kvm_sregs);
static const uint32_t KVM_SET_SREGS = FL_IN(0x84, struct kvm_sregs);
static const uint32_t KVM_SET_MSRS = FL_IN(0x89, struct kvm_msrs);
static const uint32_t KVM_SET_CPUID2 = FL_IN(0x90, struct kvm_cpuid2);

_Static_assert(FL_IN(0x84, struct kvm_sregs) == 0x4138ae84, "a well-known number");

/// A failing emulation ends the run, whatever the guest's privilege: argument 1 of KVM_ENABLE_CAP.
enum { KVM_CAP_EXIT_ON_EMULATION_FAILURE = 204 };
