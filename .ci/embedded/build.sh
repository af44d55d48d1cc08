#!/usr/bin/env bash
# Compiles the core in Embedded Swift for bare-metal targets and for x86_64 Linux, links the program in Embedded/Sources
# for x86_64 Linux against libc, and runs it. Needs nothing but the Swift toolchain.
#
#   .ci/embedded/build.sh                 every target; only the one that runs is optimised, which saves half the time
#   .ci/embedded/build.sh -O              every target, optimised
#   .ci/embedded/build.sh [-O] TRIPLE...  only these; the program runs if x86_64-unknown-linux-gnu is among them
#
# Output: .embedded/<triple>/. If a compilation, the link or the program fails, so does the script, with their messages.
set -euo pipefail
export LC_ALL=C

linux=x86_64-unknown-linux-gnu
# The longest first.
triples=("$linux" riscv64-none-none-eabi aarch64-none-none-elf x86_64-unknown-none-elf)
bare_metal_level=-Onone
if [[ ${1-} == -O ]]; then
    bare_metal_level=-O
    shift
fi
if (($# > 0)); then triples=("$@"); fi

# Leaf first: a module sees only those before it. LogConsumers and Machine are no core modules, but a
# hypervisor wants them.
modules=(Frames Synchrony Audit HostMemory GuestMemory Paging Hardware LogConsumers Machine)

if [[ ! -f Package.swift || ! -d Sources/Frames ]]; then
    echo "run me from the package root" >&2
    exit 1
fi

# The linker and the C compiler are those beside swiftc: what is installed on the machine plays no part.
swiftc=$(command -v swiftc) || { echo "swiftc is not in PATH" >&2; exit 1; }
clang=$(dirname "$(readlink -f "$swiftc")")/clang

flags=(
    -wmo -parse-as-library -swift-version 6 -warnings-as-errors
    -enable-experimental-feature Embedded -enable-experimental-feature Lifetimes
    # One section a function, so that the linker drops what a program doesn't use.
    -Xfrontend -function-sections
    # Bare metal has no __stack_chk_fail.
    -Xfrontend -disable-stack-protector
    -Xcc -fmodule-map-file=.ci/embedded/CSchedule/module.modulemap
    # The C header takes its integer types from the compiler, not from the machine's libc.
    -Xcc -ffreestanding
)

# Runs a command silently; its output is shown if it fails.
quietly() {
    local log=$1
    shift
    if ! "$@" >"$log" 2>&1; then
        echo "failed: $*" >&2
        cat "$log" >&2
        exit 1
    fi
}

# All Swift files under a folder, in an order that doesn't depend on the file system.
sources_of() { find "$1" -name '*.swift' | sort; }

level_of() { if [[ $1 == "$linux" ]]; then echo -O; else echo "$bare_metal_level"; fi; }

compile_module() {
    local triple=$1 module=$2 out=$3
    local files level
    level=$(level_of "$triple")
    mapfile -t files < <(sources_of "Sources/$module")
    quietly "$out/$module.log" "$swiftc" -target "$triple" "$level" "${flags[@]}" -module-name "$module" -I "$out" \
        -emit-module -emit-module-path "$out/$module.swiftmodule" -c -o "$out/$module.o" "${files[@]}"
}

size_of() { printf '%s %s' "$1" "$((($(stat -c %s "$2") + 1023) / 1024))"; }

compile_core() {
    local triple=$1 out=.embedded/$1 start=$EPOCHREALTIME
    rm -rf "$out"
    mkdir -p "$out"
    quietly "$out/CSchedule.log" "$clang" --target="$triple" -O2 -Wall -Werror -ffreestanding -ffunction-sections \
        -I Sources/CSchedule/include -c Sources/CSchedule/schedule.c -o "$out/CSchedule.o"
    local line=""
    for module in "${modules[@]}"; do
        [[ -d Sources/$module ]] || continue
        compile_module "$triple" "$module" "$out"
        line+=", $(size_of "$module" "$out/$module.o")"
    done
    printf '%-26s %-6s %5s s   KiB:%s\n' "$triple" "$(level_of "$triple")" "$(elapsed "$start")" "${line#,}"
}

# Seconds since `start`, with one decimal.
elapsed() {
    local tenths=$(((${EPOCHREALTIME/./} - ${1/./}) / 100000))
    printf '%d.%d' $((tenths / 10)) $((tenths % 10))
}

link_and_run() {
    local out=.embedded/$linux start=$EPOCHREALTIME
    local files
    mapfile -t files < <(sources_of Embedded/Sources)
    quietly "$out/Program.log" "$swiftc" -target "$linux" -O "${flags[@]}" -enable-experimental-feature Extern \
        -module-name Program -I "$out" -c -o "$out/Program.o" "${files[@]}"
    quietly "$out/link.log" "$clang" --target="$linux" -fuse-ld=lld -Wl,--gc-sections -o "$out/program" "$out"/*.o
    printf '%-26s %-6s %5s s   KiB: %s\n' "program" -O "$(elapsed "$start")" "$(size_of program "$out/program")"
    "$out/program"
    same_verdicts "$out/program"
}

# Every scenario, as a plan, in the Embedded program and in the hosted command: each run must end the same way, event by
# event. Needs the release build of the command.
same_verdicts() {
    local faultline=.build/release/faultline scenario plan=.embedded/plan count=0
    if [[ ! -x $faultline ]]; then
        echo "scenarios not compared: no $faultline (swift build -c release)"
        return 0
    fi
    for scenario in Scenarios/*.yaml; do
        "$faultline" plan "$scenario" "$plan"
        "$1" "$plan" >.embedded/embedded.digest || { echo "failed: Embedded run of $scenario" >&2; exit 1; }
        "$faultline" digest "$scenario" >.embedded/hosted.digest
        if ! cmp -s .embedded/embedded.digest .embedded/hosted.digest; then
            echo "failed: $scenario ends differently in Embedded Swift" >&2
            diff .embedded/hosted.digest .embedded/embedded.digest >&2 || true
            exit 1
        fi
        count=$((count + $(wc -l <.embedded/hosted.digest)))
    done
    echo "scenarios: $count runs, the same in Embedded Swift as on the host"
}

# As many targets at a time as there are processors; their lines in the order of the list.
start=$EPOCHREALTIME
mkdir -p .embedded
pids=()
for triple in "${triples[@]}"; do
    while (($(jobs -rp | wc -l) >= $(nproc))); do wait -n || true; done
    compile_core "$triple" >".embedded/$triple.out" 2>&1 &
    pids+=($!)
done
status=0
for i in "${!triples[@]}"; do
    wait "${pids[i]}" || status=1
    cat ".embedded/${triples[i]}.out"
done
((status == 0)) || exit 1

for triple in "${triples[@]}"; do
    if [[ $triple == "$linux" ]]; then link_and_run; fi
done
echo "embedded: $(elapsed "$start") s"
