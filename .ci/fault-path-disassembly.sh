#!/usr/bin/env bash
# Follows the direct calls from the TDP MMU's fault entry through the release binary, and prints every call on the way that
# counts references, allocates, or checks overlapping accesses at run time. Fails when there is one that counts or
# allocates.
#
#     .ci/fault-path-disassembly.sh [BINARY] [--list]
#
# Followed: `TDPMMU.handleFault` and whatever it calls or jumps to in the binary itself, but for the slow ways below. Calls
# through a pointer (of an open class, of a closure) can't be followed here; they are counted and shown, and
# `faultline bench x86` counts at run time what one fault really calls.
set -euo pipefail
cd "$(dirname "$0")/.."
binary=.build/release/faultline
list=0
for argument in "$@"; do
    case $argument in
        --list) list=1 ;;
        *) binary=$argument ;;
    esac
done

tool=$(command -v objdump || command -v llvm-objdump || true)
[ -n "$tool" ] || { echo "skipped: no objdump"; exit 0; }
[ -f "$binary" ] || { echo "no such binary: $binary"; exit 2; }

# The entry, mangled: TDPMMU.handleFault(_:_:).
entry='^[$]s6Paging6TDPMMUC11handleFaulty'

# Slow ways: none runs when the host's page is there, the tables are there, the slot is a plain one, and nothing listens.
# One regular expression a line, on the mangled name, and why.
slow=$(sed -e 's/ *#.*//' -e '/^$/d' <<'LIST'
JournalC                             # a journal listens: never in a VM that runs for speed
11AllocatorC|allocateTable|allocatePages|freePages|freeFolio|freeTable   # a table is missing, or the last reference goes
takeRoot|shareRoot|dropObsoleteRoot  # the vCPU has no root
freeRemoved|tableReplaced|checkRemoved|6removeyy  # a table went
leafReplaced                         # a leaf was there already
handleMMIO|serveNoSlot|cachesMMIO    # no slot
servePrivate|faultInPrivate|memoryFault|FrameAttributes  # private memory
fixWithoutLock                       # the entry is present: the fast path, which installs nothing
slow|throughPFNMap|isPoisoned|getUserPageUnlocked|remapped  # the page is not in the host's table: page supply
answer|FaultFamily|FaultAnswers      # the fault fails
4link|4fill|trackPossible            # a table is missing
postpone|AsyncFault                  # the page needs I/O
8DirtyLog|DirtyRing|DirtyBitmap|markDirtyLogged  # the slot is logged
waitFor|BackoffV                     # somebody else has the lock
5GuessV|TrackedV|Guessed|forget|5guess|7tracked   # the old policies
SlotSetC6search|findSlot             # the hint misses
isTracked|TrackedFrames              # the MMU tracks writes
makeExtra|5extra                     # made once a vCPU
refuse|Finding                       # a rule is broken
oneTimeInit|_WZ$                     # once a process
MachineC4telly|MemoryC4telly           # a journal listens
giveBack|TableReserveV4fill|addTable  # a table is missing
checkRequest|tellMarked|checkInstalled|tellFailure|noteReleaseOf   # a rule is looked at by a journal, or is broken
serveAPIC                            # the APIC's page
holdAsBefore|markAsBefore|markByNumber  # a patch of the series is taken back
faultInWaiting                       # the page is not in the host's table: page supply
handleNestedFault|tracksForNested|letGuestWrite|unprotecting  # nested guests
logWrite                             # the slot is logged
isDisallowedTable                    # huge leaves
waitToEnter                          # somebody else has the lock
hasPrivateAttribute                  # private memory
LIST
)

"$tool" -d --no-show-raw-insn "$binary" | entry=$entry slow=$slow list=$list awk '
function name_of(text) { match(text, /<[^>]*>/); return substr(text, RSTART + 1, RLENGTH - 2) }
BEGIN { entry = ENVIRON["entry"]; list = ENVIRON["list"] + 0; patterns = split(ENVIRON["slow"], pattern, "\n") }
/^[0-9a-f]+ <.*>:$/ {
    current = name_of($0); if (current ~ entry && !(current in known)) starts[++count] = current
    known[current] = 1; next
}
/^ *[0-9a-f]+:/ {
    instructions[current]++
    if ($0 ~ /[ \t]lock |[ \t]xchg .*\(/) locked[current]++
    if ($0 ~ /[ \t](call|jmp|bl|b)q?[ \t]+\*/) { if ($0 ~ /call/) pointers[current]++; next }
    if ($0 ~ /[ \t](call|j[a-z]+|bl|b)q?[ \t]+[0-9a-fx]+ </) {
        target = name_of($0); sub(/\+0x[0-9a-f]+$/, "", target)
        if (target != current) { key = current SUBSEP target; if (!(key in edge)) { edge[key] = 1
            targets[current] = targets[current] "\n" target } calls[key]++ }
    }
}
function is_slow(name,  i) { for (i = 1; i <= patterns; i++) if (name ~ pattern[i]) return 1; return 0 }
END {
    if (!count) { print "the fault entry is not in the binary"; exit 2 }
    for (i = 1; i <= count; i++) { queue[++last] = starts[i]; seen[starts[i]] = 1 }
    for (first = 1; first <= last; first++) {
        from = queue[first]; functions++
        if (list) printf "%6d instructions %3d locked %2d through pointers  %s\n", instructions[from], locked[from], pointers[from], from
        through += pointers[from]
        parts = split(targets[from], reached, "\n")
        for (i = 1; i <= parts; i++) {
            to = reached[i]; if (to == "") continue
            if (to ~ /^swift_(bridgeObject)?(retain|release|unknownObject)|^swift_(retain|release)/ || to ~ /swift_(unowned|weak)/) {
                printf "counts      %-28s %3d times in %s\n", to, calls[from SUBSEP to], from; bad++
            } else if (to ~ /^(swift_(alloc|slowAlloc|dealloc|initStackObject|allocObject)|malloc|free|posix_memalign|calloc|realloc)/) {
                printf "allocates   %-28s %3d times in %s\n", to, calls[from SUBSEP to], from; bad++
            } else if (to ~ /^swift_(begin|end)Access/) {
                printf "checks      %-28s %3d times in %s\n", to, calls[from SUBSEP to], from; checks++
            } else if (to in known && to !~ /@plt/ && !(to in seen)) {
                seen[to] = 1
                if (is_slow(to)) { skipped[++skips] = to; continue }
                queue[++last] = to
            }
        }
    }
    if (list) for (i = 1; i <= skips; i++) print "not followed  " skipped[i]
    printf "%d functions followed, %d slow ways not, %d calls through pointers\n", functions, skips, through
    if (bad) { print "FAILED: the fault path counts references or allocates"; exit 1 }
    print "ok: no reference is counted and nothing is allocated on the fault path"
}'
