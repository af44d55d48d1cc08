/* The basic race, by hand, for SPIN: a vCPU's first write to a page against the munmap of that page.
 *
 * Faultline's explorer runs the core itself; this model has only what the race is about, each shared access a step of its
 * own: the primary entry, the stage-2 entry, the TLB, the invalidation count, mmu_lock, the page-table lock, the page's
 * references, the flush by request. Compare the numbers with that in mind. Rules: generic 2.8, 3.2, 3.3, I-1, I-6, I-13.
 *
 *   spin -a race.pml && gcc -O2 -DSAFETY -o pan pan.c && ./pan        (-DNOREDUCE: without SPIN's reduction)
 *   spin -DNO_RETRY_CHECK -a race.pml: the retry check is missing, and the assertion says so
 */
bool mmuLock, tableLock, mmapWriter;
byte mmapReaders;
byte primary = 0;            /* the page that the process maps, 0 for none; there is one page, 1 */
byte stage2 = 0, tlb = 0;
byte sequence = 0, inProgress = 0;
byte references = 0;         /* of page 1 */
bool inGuest = false, flushRequest = false, mapped = true, freed = false;

inline lock(l) { atomic { !l -> l = true } }
inline unlock(l) { l = false }
inline put() {
    atomic {
        references--;
        if
        :: references == 0 ->
            freed = true;
            assert(stage2 == 0);                         /* I-6 */
            assert(tlb == 0 || (flushRequest && !inGuest)) /* I-13 */
        :: else
        fi
    }
}

proctype VirtualCPU() {
    byte snapshot, page;
again:
    /* requests, then guest mode, then the last look at the requests */
    atomic { if :: flushRequest -> flushRequest = false; tlb = 0 :: else fi }
    inGuest = true;
    if :: flushRequest -> inGuest = false; goto again :: else fi;
    if
    :: tlb != 0 -> assert(!freed); inGuest = false; goto done   /* the write */
    :: else
    fi;
    page = stage2;
    if
    :: page != 0 -> tlb = page; assert(!freed); inGuest = false; goto done
    :: else
    fi;
    inGuest = false;
    /* the fault */
    snapshot = sequence;
    atomic { !mmapWriter -> mmapReaders++ }
    if
    :: !mapped -> mmapReaders--; goto done               /* EFAULT */
    :: else
    fi;
    lock(tableLock);
    if
    :: primary == 0 -> primary = 1; references++         /* a fresh page: the entry's reference */
    :: else
    fi;
    page = primary;
    references++;
    unlock(tableLock);
    mmapReaders--;
    lock(mmuLock);
#ifndef NO_RETRY_CHECK
    if
    :: inProgress != 0 || sequence != snapshot -> put(); unlock(mmuLock); goto again
    :: else
    fi;
#endif
    assert(primary == page);                             /* I-7 */
    stage2 = page;
    put();
    unlock(mmuLock);
    goto again;
done:
    skip
}

proctype Munmap() {
    byte page;
    atomic { !mmapWriter && mmapReaders == 0 -> mmapWriter = true }
    lock(mmuLock);
    inProgress++;
    if
    :: stage2 != 0 ->
        stage2 = 0;
        flushRequest = true;
        !inGuest
    :: else
    fi;
    unlock(mmuLock);
    lock(tableLock);
    page = primary;
    primary = 0;
    unlock(tableLock);
    lock(mmuLock);
    sequence++;
    inProgress--;
    unlock(mmuLock);
    mapped = false;
    mmapWriter = false;
    if :: page != 0 -> put() :: else fi
}

init {
    atomic { run VirtualCPU(); run Munmap() }
    _nr_pr == 1;
    assert(inProgress == 0 && stage2 == 0 && references == 0)   /* I-9, I-21, I-1 */
}
