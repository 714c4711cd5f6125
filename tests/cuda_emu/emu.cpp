/* emu: runs the CUDA kernels of cuda/ on a CPU, for tests: a fiber for each thread of a block, blocks one after the other.
 * A fiber runs until it waits for others: at a barrier of the block or an exchange of its warp. What no GPU would take kindly
 * ends the process, with the kernel, block and thread: barriers that not all threads reach, or at different places; exchanges
 * that lack a lane of their mask. Dynamic shared memory is the heap's, filled with NaN, so that a sanitizer sees its ends.
 * Source: the semantics of the CUDA C++ Programming Guide, sections on synchronization and warp functions.
 * SPDX-License-Identifier: Apache-2.0 */
#include "emu.h"

#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>
#include <mutex>
#include <pthread.h>
#include <sys/mman.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
unsigned emu_thread;
dim3 blockDim, gridDim;

namespace {

enum { MAX_THREADS = 1024, STACK = 256 << 10, MASKS = 8 };

/* ---- fibers ------------------------------------------------------------------------------------------------------------ */

struct context {
    void *sp;
#ifdef __SANITIZE_ADDRESS__
    void *fake;
#endif
};

#ifndef __x86_64__
#error "fibers are switched by hand: add this processor's registers to emu_switch"
#endif

extern "C" void emu_switch(void **save, void *load);
asm(".text\n"
    ".globl emu_switch\n.hidden emu_switch\n.type emu_switch,@function\n"
    "emu_switch:\n"
    "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq %rsi, %rsp\n"
    "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
    "    ret\n"
    ".size emu_switch,.-emu_switch\n");

struct group; /* of lanes that exchange */

struct fiber {
    context at;
    uint8_t *stack;
    bool done;
    const unsigned *generation; /* waits until this is no longer `seen` */
    unsigned seen;
    const char *what, *file; /* it waits for */
    int line;
};

struct group {
    unsigned mask, arrived, generation;
    const char *what, *file;
    int line;
    emu_value values[2][32];
};

struct {
    fiber fibers[MAX_THREADS];
    context scheduler;
    unsigned n, left;
    const char *kernel;
    void (*body)(const void *);
    const void *closure;
    void *shared;
    struct {
        unsigned arrived, generation;
        const char *file;
        int line;
    } barrier;
    group groups[MAX_THREADS / 32][MASKS];
    const void *host_stack;
    size_t host_size;
} block;

bool reverse;
unsigned long launches;
std::mutex lock;

void switch_to(context *from, context *to, const void *stack, size_t size, bool last)
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(last ? nullptr : &from->fake, stack, size);
    emu_switch(&from->sp, to->sp);
    __sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);
#else
    (void)stack, (void)size, (void)last;
    emu_switch(&from->sp, to->sp);
#endif
}

void hand_over(fiber &f, bool last);

void enter()
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    block.body(block.closure);
    fiber &f = block.fibers[emu_thread];
    f.done = true;
    block.left--;
    hand_over(f, true);
    abort();
}

/* The scheduler's own stack, where a sanitizer asks. */
void find_host_stack()
{
#ifdef __SANITIZE_ADDRESS__
    static thread_local void *stack;
    static thread_local size_t size;
    if (stack == nullptr) {
        pthread_attr_t attr;
        pthread_getattr_np(pthread_self(), &attr);
        pthread_attr_getstack(&attr, &stack, &size);
        pthread_attr_destroy(&attr);
    }
    block.host_stack = stack;
    block.host_size = size;
#endif
}

void start(fiber &f)
{
    if (f.stack == nullptr) {
        void *p = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED)
            emu_wrong("no memory for a thread's stack");
        f.stack = static_cast<uint8_t *>(p);
    }
    const size_t shift = static_cast<size_t>(&f - block.fibers) * 320 % (32 << 10); /* else all stacks want the same lines of the cache */
    void **top = reinterpret_cast<void **>(f.stack + STACK - shift);
    *--top = nullptr; /* a return address for enter, which does not return */
    *--top = reinterpret_cast<void *>(enter);
    for (int i = 0; i < 6; i++)
        *--top = nullptr;
    f.at.sp = top;
    f.done = false;
    f.generation = nullptr;
}

void place(unsigned thread)
{
    threadIdx.x = thread % blockDim.x;
    threadIdx.y = thread / blockDim.x % blockDim.y;
    threadIdx.z = thread / blockDim.x / blockDim.y;
}

bool same(const char *a, const char *b)
{
    return a == b || strcmp(a, b) == 0;
}

/* ---- a block ----------------------------------------------------------------------------------------------------------- */

bool ready(const fiber &f)
{
    return !f.done && (f.generation == nullptr || *f.generation != f.seen);
}

/* The next thread that can go on, after `from`; block.n when there is none before the last. */
unsigned next_ready(unsigned from)
{
    if (reverse) {
        while (from-- > 0)
            if (ready(block.fibers[from]))
                return from;
        return block.n;
    }
    while (++from < block.n && !ready(block.fibers[from]))
        continue;
    return from;
}

/* From a thread that waits, or has ended, to the next one that can go on; from the last one to the scheduler. */
void hand_over(fiber &f, bool last)
{
    const unsigned next = next_ready(emu_thread);
    if (next == block.n) {
        switch_to(&f.at, &block.scheduler, block.host_stack, block.host_size, last);
        return;
    }
    emu_thread = next;
    place(next);
    switch_to(&f.at, &block.fibers[next].at, block.fibers[next].stack, STACK, last);
}

void wait(const unsigned *generation, unsigned seen, const char *what, const char *file, int line)
{
    fiber &f = block.fibers[emu_thread];
    f.generation = generation;
    f.seen = seen;
    f.what = what;
    f.file = file;
    f.line = line;
    hand_over(f, false);
    f.generation = nullptr;
}

[[noreturn]] void stuck()
{
    unsigned waits = block.n, ended = block.n;
    for (unsigned i = 0; i < block.n; i++) {
        if (block.fibers[i].done)
            ended = i;
        else if (waits == block.n)
            waits = i;
    }
    const fiber &f = block.fibers[waits];
    for (unsigned i = waits / 32 * 32; i < block.n && strcmp(f.what, "__syncthreads") != 0 && i < waits / 32 * 32 + 32; i++)
        if (block.fibers[i].done || block.fibers[i].generation != f.generation)
            ended = i;
    emu_thread = waits;
    place(waits);
    if (ended == block.n || block.fibers[ended].done)
        emu_wrong("waits in %s (%s:%d), which not all threads reach: thread %u has ended", f.what, f.file, f.line, ended);
    const fiber &o = block.fibers[ended];
    emu_wrong("waits in %s (%s:%d), thread %u in %s (%s:%d)", f.what, f.file, f.line, ended, o.what, o.file, o.line);
}

void run_block()
{
    block.left = block.n;
    block.barrier.arrived = 0;
    memset(block.groups, 0, sizeof block.groups[0] * (block.n / 32));
    for (unsigned i = 0; i < block.n; i++)
        start(block.fibers[i]);
    while (block.left > 0) {
        const unsigned first = next_ready(reverse ? block.n : UINT_MAX);
        if (first == block.n)
            stuck();
        emu_thread = first;
        place(first);
        switch_to(&block.scheduler, &block.fibers[first].at, block.fibers[first].stack, STACK, false);
    }
}

} // namespace

void emu_wrong(const char *fmt, ...)
{
    char text[400];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    fprintf(stderr, "cuda_emu: kernel %s, block (%u, %u, %u), thread %u: %s\n", block.kernel, blockIdx.x, blockIdx.y, blockIdx.z, emu_thread,
            text);
    abort();
}

void *emu_shared()
{
    return block.shared;
}

void emu_barrier(const char *file, int line)
{
    auto &b = block.barrier;
    if (b.arrived == 0) {
        b.file = file;
        b.line = line;
    } else if (b.line != line || !same(b.file, file)) {
        emu_wrong("__syncthreads at %s:%d while others wait at %s:%d", file, line, b.file, b.line);
    }
    const unsigned seen = b.generation;
    if (++b.arrived == block.n) {
        b.arrived = 0;
        b.generation++;
    } else {
        wait(&b.generation, seen, "__syncthreads", file, line);
    }
}

const emu_value *emu_exchange(const char *what, unsigned mask, const void *value, size_t n, const char *file, int line)
{
    const unsigned lane = emu_thread % 32;
    group *g = block.groups[emu_thread / 32];
    if (!(mask >> lane & 1))
        emu_wrong("%s (%s:%d): lane %u is not in its own mask %08x", what, file, line, lane, mask);
    for (int i = 0; g->mask != mask && g->mask != 0; i++, g++)
        if (i + 1 == MASKS)
            emu_wrong("%s (%s:%d): more masks than the harness knows", what, file, line);
    g->mask = mask;
    if (g->arrived == 0) {
        g->what = what;
        g->file = file;
        g->line = line;
    } else if (g->line != line || !same(g->what, what) || !same(g->file, file)) {
        emu_wrong("%s at %s:%d while other lanes wait in %s at %s:%d", what, file, line, g->what, g->file, g->line);
    }
    const unsigned seen = g->generation;
    memcpy(&g->values[seen % 2][lane], value, n);
    g->arrived |= 1u << lane;
    if (g->arrived == mask) {
        g->arrived = 0;
        g->generation++;
    } else {
        wait(&g->generation, seen, what, file, line);
    }
    return g->values[seen % 2];
}

void emu_run(const char *kernel, dim3 grid, dim3 threads, size_t shared, void (*body)(const void *), const void *closure)
{
    const std::lock_guard<std::mutex> guard(lock);
    launches++;
    find_host_stack();
    block.kernel = kernel;
    block.n = threads.x * threads.y * threads.z;
    block.body = body;
    block.closure = closure;
    blockDim = threads;
    gridDim = grid;
    blockIdx = {0, 0, 0};
    if (block.n == 0 || block.n > MAX_THREADS || block.n % 32 != 0)
        emu_wrong("a block of %u threads; whole warps and at most %d are wanted", block.n, MAX_THREADS);
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
        emu_wrong("a grid of %u × %u × %u blocks", grid.x, grid.y, grid.z);
    if (shared > 227 << 10)
        emu_wrong("%zu bytes of shared memory", shared);
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                block.shared = malloc(shared + 1);
                memset(block.shared, 0xff, shared);
                run_block();
                free(block.shared);
            }
}

void emu_set_reverse(bool r)
{
    reverse = r;
}

unsigned long emu_launches(void)
{
    return launches;
}
