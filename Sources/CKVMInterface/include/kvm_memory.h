// What the memory calls pass. Multi-byte fields have the machine's byte order; there is no padding but what is named.
#pragma once
#include <stddef.h>
#include <stdint.h>

/// KVM_SET_USER_MEMORY_REGION.
struct kvm_userspace_memory_region {
    uint32_t slot;             ///< low half: the slot; high half: the address space
    uint32_t flags;            ///< KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
    uint64_t guest_phys_addr;  ///< where the guest sees it, bytes
    uint64_t memory_size;      ///< bytes; 0 deletes
    uint64_t userspace_addr;   ///< where the process has it
};
_Static_assert(sizeof(struct kvm_userspace_memory_region) == 32, "size");

/// KVM_SET_USER_MEMORY_REGION2: the same, with private memory.
struct kvm_userspace_memory_region2 {
    uint32_t slot;
    uint32_t flags;
    uint64_t guest_phys_addr;
    uint64_t memory_size;
    uint64_t userspace_addr;
    uint64_t guest_memfd_offset;  ///< bytes into the file
    uint32_t guest_memfd;         ///< its descriptor
    uint32_t pad1;
    uint64_t pad2[14];
};
_Static_assert(sizeof(struct kvm_userspace_memory_region2) == 160, "size");
_Static_assert(offsetof(struct kvm_userspace_memory_region2, guest_memfd) == 40, "layout");

enum {
    KVM_MEM_LOG_DIRTY_PAGES = 1 << 0,
    KVM_MEM_READONLY = 1 << 1,
    KVM_MEM_GUEST_MEMFD = 1 << 2,
};

/// KVM_GET_DIRTY_LOG.
struct kvm_dirty_log {
    uint32_t slot;
    uint32_t padding1;
    union {
        void *dirty_bitmap;  ///< one bit for each page, in whole 64-bit words
        uint64_t padding2;
    };
};
_Static_assert(sizeof(struct kvm_dirty_log) == 16, "size");

/// KVM_CLEAR_DIRTY_LOG.
struct kvm_clear_dirty_log {
    uint32_t slot;
    uint32_t num_pages;
    uint64_t first_page;
    union {
        void *dirty_bitmap;  ///< bit 0 is page `first_page`
        uint64_t padding2;
    };
};
_Static_assert(sizeof(struct kvm_clear_dirty_log) == 24, "size");

/// KVM_ENABLE_CAP.
struct kvm_enable_cap {
    uint32_t cap;
    uint32_t flags;
    uint64_t args[4];
    uint8_t pad[64];
};
_Static_assert(sizeof(struct kvm_enable_cap) == 104, "size");

/// Bits of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2's args[0].
enum {
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0,
    KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1,
};

/// KVM_CREATE_GUEST_MEMFD.
struct kvm_create_guest_memfd {
    uint64_t size;
    uint64_t flags;
    uint64_t reserved[6];
};
_Static_assert(sizeof(struct kvm_create_guest_memfd) == 64, "size");

/// KVM_SET_MEMORY_ATTRIBUTES.
struct kvm_memory_attributes {
    uint64_t address;
    uint64_t size;
    uint64_t attributes;
    uint64_t flags;
};
_Static_assert(sizeof(struct kvm_memory_attributes) == 32, "size");

static const uint64_t KVM_MEMORY_ATTRIBUTE_PRIVATE = UINT64_C(1) << 3;

/// KVM_PRE_FAULT_MEMORY: `gpa` and `size` come back as what is left.
struct kvm_pre_fault_memory {
    uint64_t gpa;
    uint64_t size;
    uint64_t flags;
    uint64_t padding[5];
};
_Static_assert(sizeof(struct kvm_pre_fault_memory) == 64, "size");

/// One entry of a vCPU's dirty ring.
struct kvm_dirty_gfn {
    uint32_t flags;
    uint32_t slot;    ///< as in a memory region
    uint64_t offset;  ///< frames from the slot's first
};
_Static_assert(sizeof(struct kvm_dirty_gfn) == 16, "size");

enum {
    KVM_DIRTY_GFN_F_DIRTY = 1 << 0,  ///< the kernel has filled it
    KVM_DIRTY_GFN_F_RESET = 1 << 1,  ///< the program has read it
    /// Where a vCPU's ring begins in its descriptor, in pages.
    KVM_DIRTY_LOG_PAGE_OFFSET = 64,
};
