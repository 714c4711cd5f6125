/* emu: runs the CUDA kernels of cuda/ on a CPU, for tests: a fiber for each thread of a block, blocks one after the other.
 * A fiber runs until it waits for others: at a barrier of the block or an exchange of its warp. What no GPU would take kindly
 * ends the process, with the kernel, block and thread: barriers that not all threads reach, or at different places; exchanges
 * that lack a lane of their mask; threads that do not wait for earlier kernels. Dynamic shared memory is the heap's, filled with NaN, so that
 * a sanitizer sees its ends.
 * Source: the semantics of the CUDA C++ Programming Guide, sections on synchronization and warp functions.
 * SPDX-License-Identifier: Apache-2.0 */
#include "emu.h"

#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>
#include <map>
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

struct fiber {
    context at;
    uint8_t *stack;
    uint3 index; /* threadIdx */
    bool done, waited; /* waited: for earlier kernels */
    const void *waits; /* the meeting that it waits for; what follows names it */
    const char *what, *file;
    int line;
};

struct meeting { /* of a warp's lanes, or of all threads of a block */
    unsigned mask, arrived, generation;
    const char *what, *file;
    int line;
};

struct warp {
    unsigned ready; /* lanes that can go on */
    meeting groups[MASKS];
    emu_value values[MASKS][2][32];
};

struct {
    fiber fibers[MAX_THREADS];
    warp warps[MAX_THREADS / 32];
    meeting barrier;
    context scheduler;
    unsigned n, left;
    const char *kernel;
    void (*body)(const void *);
    const void *closure;
    void *shared;
    meeting *met; /* between emu_arrive and emu_meet */
    emu_value *given;
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

void must_have_waited(const fiber &f)
{
    if (!f.waited)
        emu_wrong("has not waited for the kernels before this one (wait_for_earlier)");
}

void enter()
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    block.body(block.closure);
    fiber &f = block.fibers[emu_thread];
    must_have_waited(f);
    f.done = true;
    block.left--;
    block.warps[emu_thread / 32].ready &= ~(1u << emu_thread % 32);
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
    f.done = f.waited = false;
}

void place(unsigned thread)
{
    emu_thread = thread;
    threadIdx = block.fibers[thread].index;
}

bool same(const char *a, const char *b)
{
    return a == b || strcmp(a, b) == 0;
}

/* ---- a block ----------------------------------------------------------------------------------------------------------- */

unsigned outermost(unsigned lanes)
{
    return reverse ? 31u - static_cast<unsigned>(__builtin_clz(lanes)) : static_cast<unsigned>(__builtin_ctz(lanes));
}

/* The thread that goes on after `from`: one of its own warp if there is one, so that warps are as far apart as barriers let them be. block.n
 * when there is none. */
unsigned next_ready(unsigned from)
{
    const unsigned lane = from % 32, own = block.warps[from / 32].ready, n = block.n / 32;
    const unsigned after = reverse ? own & ((1u << lane) - 1) : own & ~((2u << lane) - 1);
    if (own != 0)
        return from / 32 * 32 + outermost(after != 0 ? after : own);
    for (unsigned i = 1; i < n; i++) {
        const unsigned w = (reverse ? from / 32 + n - i : from / 32 + i) % n;
        if (block.warps[w].ready != 0)
            return w * 32 + outermost(block.warps[w].ready);
    }
    return block.n;
}

/* From a thread that waits, or has ended, to the next one that can go on; where there is none, to the scheduler. */
void hand_over(fiber &f, bool last)
{
    const unsigned next = next_ready(emu_thread);
    if (next == block.n) {
        switch_to(&f.at, &block.scheduler, block.host_stack, block.host_size, last);
        return;
    }
    place(next);
    switch_to(&f.at, &block.fibers[next].at, block.fibers[next].stack, STACK, last);
}

void wait(const meeting &m, const char *what, const char *file, int line)
{
    fiber &f = block.fibers[emu_thread];
    f.waits = &m;
    f.what = what;
    f.file = file;
    f.line = line;
    block.warps[emu_thread / 32].ready &= ~(1u << emu_thread % 32);
    hand_over(f, false);
    f.waits = nullptr;
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
        if (block.fibers[i].done || block.fibers[i].waits != f.waits)
            ended = i;
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
    for (unsigned i = 0; i < block.n / 32; i++) {
        block.warps[i].ready = ~0u;
        memset(block.warps[i].groups, 0, sizeof block.warps[i].groups);
    }
    for (unsigned i = 0; i < block.n; i++)
        start(block.fibers[i]);
    const unsigned first = reverse ? block.n - 1 : 0;
    place(first);
    switch_to(&block.scheduler, &block.fibers[first].at, block.fibers[first].stack, STACK, false);
    if (block.left > 0)
        stuck();
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

static void emu_refused(const char *name, const char *fmt, ...) __attribute__((noreturn, format(printf, 2, 3)));
static void emu_refused(const char *name, const char *fmt, ...)
{
    va_list args;
    fprintf(stderr, "cuda_emu: kernel %s cannot be launched: ", name);
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
    fputc('\n', stderr);
    abort();
}

void *emu_shared()
{
    return block.shared;
}

void emu_waited(void)
{
    block.fibers[emu_thread].waited = true;
}

void emu_barrier(const char *file, int line)
{
    must_have_waited(block.fibers[emu_thread]);
    auto &b = block.barrier;
    if (b.arrived == 0) {
        b.file = file;
        b.line = line;
    } else if (b.line != line || !same(b.file, file)) {
        emu_wrong("__syncthreads at %s:%d while others wait at %s:%d", file, line, b.file, b.line);
    }
    if (++b.arrived < block.n) {
        wait(b, "__syncthreads", file, line);
        return;
    }
    b.arrived = 0;
    for (unsigned i = 0; i < block.n / 32; i++)
        block.warps[i].ready = ~0u;
}

emu_value *emu_arrive(const char *what, unsigned mask, const char *file, int line)
{
    const unsigned lane = emu_thread % 32;
    warp &w = block.warps[emu_thread / 32];
    meeting *g = w.groups;
    must_have_waited(block.fibers[emu_thread]);
    if (!(mask >> lane & 1))
        emu_wrong("%s (%s:%d): lane %u is not in its own mask %08x", what, file, line, lane, mask);
    for (; g->mask != mask && g->mask != 0; g++)
        if (g + 1 == w.groups + MASKS)
            emu_wrong("%s (%s:%d): more masks than the harness knows", what, file, line);
    g->mask = mask;
    if (g->arrived == 0) {
        g->what = what;
        g->file = file;
        g->line = line;
    } else if (g->line != line || !same(g->what, what) || !same(g->file, file)) {
        emu_wrong("%s at %s:%d while other lanes wait in %s at %s:%d", what, file, line, g->what, g->file, g->line);
    }
    block.met = g;
    return block.given = w.values[g - w.groups][g->generation % 2];
}

const emu_value *emu_meet(void (*combine)(emu_value *values))
{
    meeting &g = *block.met;
    emu_value *const values = block.given;
    g.arrived |= 1u << emu_thread % 32;
    if (g.arrived != g.mask) {
        wait(g, g.what, g.file, g.line);
        return values;
    }
    if (combine != nullptr)
        combine(values);
    g.arrived = 0;
    g.generation++;
    block.warps[emu_thread / 32].ready |= g.mask;
    return values;
}

bool emu_backwards(void)
{
    return reverse;
}

/* ---- launches ---------------------------------------------------------------------------------------------------------- */

namespace {

constexpr size_t ORDINARY = 48 << 10; /* bytes that every kernel may have */
std::map<const void *, size_t> allowed; /* of those that asked for more */
std::mutex allowed_lock;

} // namespace

cudaError_t emu_allow_shared(const void *kernel, int n)
{
    const std::lock_guard<std::mutex> guard(allowed_lock);
    if (n < 0 || static_cast<size_t>(n) > emu_shared_limit())
        return cudaErrorInvalidValue;
    allowed[kernel] = static_cast<size_t>(n);
    return cudaSuccess;
}

void emu_check_launch(const char *name, const void *kernel, dim3 grid, dim3 threads, size_t shared)
{
    const std::lock_guard<std::mutex> guard(allowed_lock);
    const unsigned n = threads.x * threads.y * threads.z;
    const size_t most = allowed.count(kernel) > 0 ? allowed[kernel] : ORDINARY;
    if (n == 0 || n > MAX_THREADS || n % 32 != 0)
        emu_refused(name, "a block of %u threads; whole warps and at most %d are wanted", n, MAX_THREADS);
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT_MAX || grid.y > 65535 || grid.z > 65535)
        emu_refused(name, "a grid of %u × %u × %u blocks", grid.x, grid.y, grid.z);
    if (shared > most)
        emu_refused(name, "%zu bytes of shared memory; it may have %zu, or %zu when it asks", shared, most, emu_shared_limit());
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
    for (unsigned i = 0; i < block.n && i < MAX_THREADS; i++)
        block.fibers[i].index = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
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
