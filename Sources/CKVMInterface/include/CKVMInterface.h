// KVM's memory interface to programs, as this project defines it: the numbers, flags and structures that its public API
// documentation (Documentation/virt/kvm/api.rst) describes, in this project's words. The installed system's own header may
// be older than the calls are, so none of it is used.
//
// Sizes are asserted, and a call's number is computed from the size of what it passes: a mistake in a structure shows as a
// number that no kernel knows.
#pragma once
#include "kvm_memory.h"
#include "kvm_numbers.h"
#include "kvm_processor.h"
#include "kvm_run.h"
#include "kvm_statistics.h"
