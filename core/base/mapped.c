/* mapped: files in memory that somebody may cut off meanwhile.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/mapped.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PLACES = 1024, FREE = 0, TAKEN, READY };

static struct place {
    atomic_int state;
    uintptr_t from, end; /* READY: they stay; end is a page's */
    atomic_bool cut;
} places[PLACES];
static uintptr_t page_bytes;

/* The instruction that found no page is run again when this returns. */
static void on_bus_error(int sig, siginfo_t *info, void *context)
{
    const int before = errno;
    const uintptr_t at = (uintptr_t)info->si_addr, page = at & ~(page_bytes - 1);
    (void)context;
    for (unsigned i = 0; i < PLACES && info->si_code > 0; i++) { /* else somebody sent it: there is no address */
        struct place *p = &places[i];
        if (atomic_load(&p->state) != READY || at < p->from || at >= p->end)
            continue;
        atomic_store(&p->cut, true);
        if (mmap((void *)page, p->end - page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
            break;
        errno = before;
        return;
    }
    signal(sig, SIG_DFL);
    if (info->si_code <= 0)
        raise(sig); /* no instruction will do it */
}

void pl_mapped_guard(void)
{
    struct sigaction act = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO};
    page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
    sigemptyset(&act.sa_mask);
    sigaction(SIGBUS, &act, NULL);
}

unsigned pl_mapped_add(const void *data, size_t n)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (unsigned i = 0; i < PLACES; i++) {
        int state = FREE;
        if (!atomic_compare_exchange_strong(&places[i].state, &state, TAKEN))
            continue;
        places[i].from = (uintptr_t)data;
        places[i].end = ((uintptr_t)data + n + page - 1) & ~(page - 1);
        atomic_store(&places[i].cut, false);
        atomic_store(&places[i].state, READY);
        return i + 1;
    }
    return 0;
}

bool pl_mapped_is_whole(unsigned place)
{
    return place == 0 || !atomic_load(&places[place - 1].cut);
}

void pl_mapped_remove(unsigned place)
{
    if (place > 0)
        atomic_store(&places[place - 1].state, FREE);
}
