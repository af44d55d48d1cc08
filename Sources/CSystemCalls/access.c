#define _GNU_SOURCE
#include "CSystemCalls.h"

#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

static sigjmp_buf after_the_signal;
static volatile sig_atomic_t expecting;

static void caught(int signal) {
    if (!expecting) _exit(3);
    expecting = 0;
    siglongjmp(after_the_signal, signal);
}

void fl_catch_signals(void) {
    static char stack[64 * 1024];
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    sigaltstack(&alternate, 0);
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = caught;
    action.sa_flags = SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, 0);
    sigaction(SIGBUS, &action, 0);
    signal(SIGCHLD, SIG_IGN);
}

void fl_reset_signals(void) {
    for (int number = 1; number < NSIG; number++) signal(number, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, 0);
}

static uint64_t load(uint64_t address, uint64_t bytes) {
    switch (bytes) {
    case 1: return *(volatile uint8_t *)address;
    case 2: return *(volatile uint16_t *)address;
    case 4: return *(volatile uint32_t *)address;
    default: return *(volatile uint64_t *)address;
    }
}

static void store(uint64_t address, uint64_t bytes, uint64_t value) {
    switch (bytes) {
    case 1: *(volatile uint8_t *)address = (uint8_t)value; break;
    case 2: *(volatile uint16_t *)address = (uint16_t)value; break;
    case 4: *(volatile uint32_t *)address = (uint32_t)value; break;
    default: *(volatile uint64_t *)address = value;
    }
}

int fl_access(uint64_t address, uint64_t bytes, int stores, uint64_t *value) {
    int signal = sigsetjmp(after_the_signal, 0);
    if (signal) return signal;
    expecting = 1;
    if (stores)
        store(address, bytes, *value);
    else
        *value = load(address, bytes);
    expecting = 0;
    return 0;
}
