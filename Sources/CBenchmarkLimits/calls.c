#include "CBenchmarkLimits.h"

#include <sys/syscall.h>
#include <unistd.h>

void limit_system_calls(size_t count) {
    for (size_t i = 0; i < count; i++) syscall(SYS_getppid);
}
