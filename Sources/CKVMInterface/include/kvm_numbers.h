// Numbers of calls and capabilities.
#pragma once
#include "kvm_memory.h"

// A call's number: direction in bits 30 and 31, size of the argument in 16 to 29, the device's letter, the call's own.
#define FL_CALL(direction, number, size) ((uint32_t)((direction) << 30 | (uint32_t)(size) << 16 | 0xaeU << 8 | (number)))
#define FL_NONE(number) FL_CALL(0U, number, 0)
/// The kernel reads the argument.
#define FL_IN(number, type) FL_CALL(1U, number, sizeof(type))
/// The kernel writes it.
#define FL_OUT(number, type) FL_CALL(2U, number, sizeof(type))
/// The kernel reads it and writes it back.
#define FL_IN_OUT(number, type) FL_CALL(3U, number, sizeof(type))

// Of the device.
static const uint32_t KVM_GET_API_VERSION = FL_NONE(0x00);
static const uint32_t KVM_CREATE_VM = FL_NONE(0x01);
// Of the device and of a VM.
static const uint32_t KVM_CHECK_EXTENSION = FL_NONE(0x03);
// Of a VM.
static const uint32_t KVM_CREATE_VCPU = FL_NONE(0x41);
static const uint32_t KVM_GET_DIRTY_LOG = FL_IN(0x42, struct kvm_dirty_log);
static const uint32_t KVM_SET_USER_MEMORY_REGION = FL_IN(0x46, struct kvm_userspace_memory_region);
static const uint32_t KVM_SET_USER_MEMORY_REGION2 = FL_IN(0x49, struct kvm_userspace_memory_region2);
static const uint32_t KVM_ENABLE_CAP = FL_IN(0xa3, struct kvm_enable_cap);
static const uint32_t KVM_CLEAR_DIRTY_LOG = FL_IN_OUT(0xc0, struct kvm_clear_dirty_log);
static const uint32_t KVM_RESET_DIRTY_RINGS = FL_NONE(0xc7);
static const uint32_t KVM_SET_MEMORY_ATTRIBUTES = FL_IN(0xd2, struct kvm_memory_attributes);
static const uint32_t KVM_CREATE_GUEST_MEMFD = FL_IN_OUT(0xd4, struct kvm_create_guest_memfd);
// Of a VM and of a vCPU.
static const uint32_t KVM_GET_STATS_FD = FL_NONE(0xce);
// Of a vCPU.
static const uint32_t KVM_RUN = FL_NONE(0x80);
static const uint32_t KVM_PRE_FAULT_MEMORY = FL_IN_OUT(0xd5, struct kvm_pre_fault_memory);

_Static_assert(FL_IN(0x46, struct kvm_userspace_memory_region) == 0x4020ae46, "a well-known number");
_Static_assert(FL_IN_OUT(0xc0, struct kvm_clear_dirty_log) == 0xc018aec0, "a well-known number");

enum {
    KVM_CAP_USER_MEMORY = 3,
    KVM_CAP_NR_VCPUS = 9,
    KVM_CAP_NR_MEMSLOTS = 10,
    KVM_CAP_SYNC_MMU = 16,
    KVM_CAP_DESTROY_MEMORY_REGION_WORKS = 21,
    KVM_CAP_JOIN_MEMORY_REGIONS_WORKS = 30,
    KVM_CAP_ENABLE_CAP = 54,
    KVM_CAP_MAX_VCPUS = 66,
    KVM_CAP_READONLY_MEM = 81,
    KVM_CAP_ENABLE_CAP_VM = 98,
    KVM_CAP_CHECK_EXTENSION_VM = 105,
    KVM_CAP_MULTI_ADDRESS_SPACE = 118,
    KVM_CAP_MAX_VCPU_ID = 128,
    KVM_CAP_IMMEDIATE_EXIT = 136,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168,
    KVM_CAP_DIRTY_LOG_RING = 192,
    KVM_CAP_BINARY_STATS_FD = 203,
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL = 223,
    KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP = 225,
    KVM_CAP_USER_MEMORY2 = 231,
    KVM_CAP_MEMORY_FAULT_INFO = 232,
    KVM_CAP_MEMORY_ATTRIBUTES = 233,
    KVM_CAP_GUEST_MEMFD = 234,
    KVM_CAP_VM_TYPES = 235,
    KVM_CAP_PRE_FAULT_MEMORY = 236,
};

/// Types of a VM on x86.
enum {
    KVM_X86_DEFAULT_VM = 0,
    KVM_X86_SW_PROTECTED_VM = 1,
};
