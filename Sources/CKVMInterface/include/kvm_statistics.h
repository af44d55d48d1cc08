// What KVM_GET_STATS_FD's descriptor holds: a header, a name of the source, descriptors, data.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct kvm_stats_header {
    uint32_t flags;      ///< 0
    uint32_t name_size;  ///< bytes of each name, with the zeros that fill it
    uint32_t num_desc;
    uint32_t id_offset;    ///< where the name of the source is
    uint32_t desc_offset;  ///< where the descriptors are
    uint32_t data_offset;  ///< where the values are
};
_Static_assert(sizeof(struct kvm_stats_header) == 24, "size");

/// `name_size` bytes of name follow each.
struct kvm_stats_desc {
    uint32_t flags;   ///< bits 0..3 kind, 4..7 unit, 8..11 base of the exponent
    int16_t exponent;
    uint16_t size;    ///< values
    uint32_t offset;  ///< bytes from the first value
    uint32_t bucket_size;
};
_Static_assert(sizeof(struct kvm_stats_desc) == 16, "size");

enum {
    KVM_STATS_NAME_SIZE = 48,
    KVM_STATS_TYPE_CUMULATIVE = 0 << 0,
    KVM_STATS_TYPE_INSTANT = 1 << 0,
    KVM_STATS_TYPE_PEAK = 2 << 0,
    KVM_STATS_UNIT_NONE = 0 << 4,
    KVM_STATS_UNIT_BYTES = 1 << 4,
    KVM_STATS_BASE_POW10 = 0 << 8,
    KVM_STATS_BASE_POW2 = 1 << 8,
};
