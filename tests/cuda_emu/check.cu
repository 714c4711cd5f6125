/* check: what the emulated device has to notice, or to do as late as a GPU may: each case is a mistake that works by chance where all is done
 * at once. Run by `make ops`. Ends with "N passed, N failed".
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/launch.h"

#include <cstdio>
#include <cstdlib>
#include <sys/wait.h>
#include <unistd.h>

static unsigned passed, failed;

static void check(bool ok, const char *what)
{
    ok ? passed++ : failed++;
    if (!ok)
        printf("emulation: %s\n", what);
}

static __global__ void add_kernel(int *to, int n)
{
    wait_for_earlier();
    if (threadIdx.x == 0)
        *to += n;
}

static __global__ void some_reach_kernel()
{
    wait_for_earlier();
    if (threadIdx.x < 16)
        __syncthreads();
}

static __global__ void lane_lacks_kernel()
{
    wait_for_earlier();
    if (threadIdx.x > 0)
        (void)__shfl_sync(ALL_LANES, 1, 2);
}

static __global__ void unaligned_kernel(const float *from, float4 *to)
{
    wait_for_earlier();
    *to = *reinterpret_cast<const float4 *>(from + 1);
}

static __global__ void hasty_kernel(int *to)
{
    if (threadIdx.x > 0)
        wait_for_earlier();
    else
        *to = 1;
}

/* Whether a process that does it is ended */
template <class F> static bool dies(F f)
{
    const pid_t child = fork();
    if (child == 0) {
        fclose(stderr);
        f();
        _exit(0);
    }
    int status = 0;
    return waitpid(child, &status, 0) == child && status != 0;
}

static void late(cudaStream_t s, int *dev)
{
    int *own = nullptr, pageable = 5, back = 0;
    check(cudaHostAlloc(reinterpret_cast<void **>(&own), 2 * sizeof(int), cudaHostAllocDefault) == cudaSuccess, "memory of the runtime's");
    (void)cudaMemsetAsync(dev, 0, sizeof(int), s);
    (void)cudaStreamSynchronize(s);
    LAUNCH(add_kernel, 1, WARP, 0, s, dev, 1);
    check(*dev == 0, "a kernel is through before anything has waited for it");
    (void)cudaStreamSynchronize(s);
    check(*dev == 1, "a kernel is not through though the stream was waited for");

    *own = 3;
    (void)cudaMemcpyAsync(dev, own, sizeof(int), cudaMemcpyHostToDevice, s);
    *own = 4;
    (void)cudaStreamSynchronize(s);
    check(*dev == 4, "bytes that a copy has not read yet can be overwritten");

    (void)cudaMemcpyAsync(dev, &pageable, sizeof(int), cudaMemcpyHostToDevice, s);
    pageable = 6;
    (void)cudaStreamSynchronize(s);
    check(*dev == 5, "of pageable memory a copy takes the bytes when it is called");

    own[1] = 0;
    LAUNCH(add_kernel, 1, WARP, 0, s, dev, 2);
    (void)cudaMemcpyAsync(&own[1], dev, sizeof(int), cudaMemcpyDeviceToHost, s);
    check(own[1] == 0, "what was fetched is there before anything has waited for it");
    (void)cudaMemcpyAsync(&back, dev, sizeof(int), cudaMemcpyDeviceToHost, s);
    check(back == 7 && own[1] == 7, "a copy to pageable memory waits for what comes before it");
    (void)cudaFreeHost(own);
}

static void captured(cudaStream_t s, int *dev)
{
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    int host = 0;
    (void)cudaMemsetAsync(dev, 0, sizeof(int), s);
    check(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal) == cudaSuccess, "a capture begins");
    LAUNCH(add_kernel, 1, WARP, 0, s, dev, 1);
    check(cudaStreamEndCapture(s, &graph) == cudaSuccess && cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess, "a capture ends with a graph");
    (void)cudaGraphLaunch(exec, s);
    (void)cudaGraphLaunch(exec, s);
    (void)cudaGraphExecDestroy(exec), (void)cudaGraphDestroy(graph);
    (void)cudaMemcpyAsync(&host, dev, sizeof host, cudaMemcpyDeviceToHost, s);
    check(host == 2, "a graph that was launched twice is done twice, also when it is given back before");

    const struct {
        const char *what;
        cudaError_t (*call)(cudaStream_t s, int *dev, int *host);
    } refused[] = {
        {"a copy from pageable memory", [](cudaStream_t s, int *dev, int *host) { return cudaMemcpyAsync(dev, host, 4, cudaMemcpyHostToDevice, s); }},
        {"a copy to pageable memory", [](cudaStream_t s, int *dev, int *host) { return cudaMemcpyAsync(host, dev, 4, cudaMemcpyDeviceToHost, s); }},
        {"waiting", [](cudaStream_t s, int *, int *) { return cudaStreamSynchronize(s); }},
        {"allocating", [](cudaStream_t, int *, int *) { void *p; return cudaMalloc(&p, 4); }},
    };
    for (const auto &r : refused) {
        (void)cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal);
        const cudaError_t said = r.call(s, dev, &host);
        const cudaError_t end = cudaStreamEndCapture(s, &graph);
        check(said == cudaErrorStreamCaptureUnsupported && end == cudaErrorStreamCaptureInvalidated, r.what);
        check(cudaGetLastError() == end && cudaGetLastError() == cudaSuccess, "what went wrong is remembered, and told once");
    }
}

static void launches(cudaStream_t s, int *dev)
{
    const auto launch = [=](dim3 grid, unsigned threads, size_t shared) {
        LAUNCH(add_kernel, grid, threads, shared, s, dev, 1);
        (void)cudaStreamSynchronize(s);
    };
    constexpr size_t KB = 1024;
    check(!dies([=] { launch(1, WARP, 48 * KB); }), "48 KB of shared memory are everybody's");
    check(dies([=] { launch(1, WARP, 49 * KB); }), "49 KB without asking");
    check(dies([=] { launch(dim3(1, 65536), WARP, 0); }) && dies([=] { launch(dim3(1, 1, 65536), WARP, 0); }), "65,536 blocks along y or z");
    check(dies([=] { launch(1, 1056, 0); }) && dies([=] { launch(1, 33, 0); }), "1,056 threads, and half a warp");
    check(cudaFuncSetAttribute(add_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 * KB) == cudaSuccess &&
              !dies([=] { launch(1, WARP, 64 * KB); }) && dies([=] { launch(1, WARP, 65 * KB); }), "64 KB after asking for them, and no more");
    check(cudaFuncSetAttribute(add_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 * KB) != cudaSuccess, "more than a block can have");
    setenv("PARLEY_EMU_FAULT", "turing", 1);
    check(cudaFuncSetAttribute(add_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 65 * KB) != cudaSuccess, "more than a block of 7.5 can have");
    unsetenv("PARLEY_EMU_FAULT");
}

static void kernels(cudaStream_t s, int *dev)
{
    const auto run = [=](auto launch) { return dies([=] { launch(), (void)cudaStreamSynchronize(s); }); };
    check(run([=] { LAUNCH(some_reach_kernel, 1, WARP, 0, s); }), "a barrier that some threads reach");
    check(run([=] { LAUNCH(lane_lacks_kernel, 1, WARP, 0, s); }), "an exchange that a lane of its mask does not reach");
    check(run([=] { LAUNCH(unaligned_kernel, 1, WARP, 0, s, reinterpret_cast<float *>(dev), reinterpret_cast<float4 *>(dev + 16)); }),
          "a load that is not aligned");
    check(run([=] { LAUNCH(hasty_kernel, 1, WARP, 0, s, dev); }), "a thread that does not wait for earlier kernels");
    check(!run([=] { LAUNCH(add_kernel, 1, WARP, 0, s, dev, 1); }), "a kernel without a mistake");
}

int main()
{
    cudaStream_t s = nullptr;
    int *dev = nullptr;
    check(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking) == cudaSuccess && cudaMalloc(reinterpret_cast<void **>(&dev), 1024) == cudaSuccess, "a GPU");
    late(s, dev);
    captured(s, dev);
    launches(s, dev);
    kernels(s, dev);
    (void)cudaFree(dev), (void)cudaStreamDestroy(s);
    printf("emulation: %u passed, %u failed\n", passed, failed);
    return failed > 0;
}
