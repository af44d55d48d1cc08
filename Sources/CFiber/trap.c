#define _GNU_SOURCE
#include "CFiber.h"

#include <signal.h>
#include <string.h>
#include <unistd.h>

// Everything here may run inside a signal handler: no allocation, no stdio.

static const fl_trap_report *reported;
static char handler_stack[64 * 1024];

static struct {
    char text[1 << 16];
    size_t length;
} out;

static void add(const char *text) {
    while (*text && out.length < sizeof out.text) out.text[out.length++] = *text++;
}

/// The inside of a JSON string.
static void add_escaped(const char *text) {
    for (; *text; text++) {
        unsigned char byte = (unsigned char)*text;
        char one[2] = {*text, 0};
        if (byte == '"' || byte == '\\') add("\\");
        if (byte < 32) {
            char code[7] = {'\\', 'u', '0', '0', "0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15], 0};
            add(code);
        } else {
            add(one);
        }
    }
}

static void add_number(uint64_t number) {
    char digits[24];
    int i = sizeof digits;
    digits[--i] = 0;
    do {
        digits[--i] = (char)('0' + number % 10);
        number /= 10;
    } while (number);
    add(digits + i);
}

static void add_task(unsigned task) {
    char name[2] = {(char)('A' + task), 0};
    add(name);
}

/// `A12.B3.A1`: who went on, for how many points.
static void add_schedule(const fl_trap_report *report) {
    uint64_t count = *report->count;
    for (uint64_t i = 0; i < count;) {
        uint64_t j = i;
        while (j < count && report->choices[j] == report->choices[i]) j++;
        if (i) add(".");
        add_task(report->choices[i]);
        add_number(j - i);
        i = j;
    }
    if (!count) add("-");
}

static const char *name_of(int signal) {
    switch (signal) {
    case SIGILL: return "SIGILL";
    case SIGTRAP: return "SIGTRAP";
    case SIGSEGV: return "SIGSEGV";
    case SIGBUS: return "SIGBUS";
    case SIGFPE: return "SIGFPE";
    default: return "SIGABRT";
    }
}

static void flush(int file) {
    size_t done = 0;
    while (done < out.length) {
        ssize_t n = write(file, out.text + done, out.length - done);
        if (n <= 0) break;
        done += (size_t)n;
    }
    out.length = 0;
}

static void handle(int signal) {
    const fl_trap_report *report = reported;
    if (report->json) {
        add("{\"verdict\":\"trap\",\"signal\":\"");
        add(name_of(signal));
        add("\",\"task\":\"");
        add_task(*report->running);
        add("\",\"schedule\":\"");
        add_schedule(report);
        add("\",\"reproduce\":\"");
        add_escaped(report->command);
        add(" --schedule ");
        add_schedule(report);
        add("\"}\n");
    } else {
        add("found: the core trapped (");
        add(name_of(signal));
        add(") in task ");
        add_task(*report->running);
        add(" after ");
        add_number(*report->count);
        add(" points; what it said stands on standard error\nschedule: ");
        add_schedule(report);
        add("\nreproduce: ");
        add(report->command);
        add(" --schedule ");
        add_schedule(report);
        add("\n");
    }
    flush(STDOUT_FILENO);
    _exit(1);
}

void fl_trap_install(const fl_trap_report *report) {
    static const int signals[] = {SIGILL, SIGTRAP, SIGSEGV, SIGBUS, SIGFPE, SIGABRT};
    reported = report;
    stack_t stack = {.ss_sp = handler_stack, .ss_size = sizeof handler_stack};
    if (report) sigaltstack(&stack, 0);
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = report ? handle : SIG_DFL;
    action.sa_flags = SA_ONSTACK | (int)SA_RESETHAND;
    for (unsigned i = 0; i < sizeof signals / sizeof *signals; i++) sigaction(signals[i], &action, 0);
}
