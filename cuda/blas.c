/* blas: finds cuBLAS and makes the calls of it. Its types and numbers are its ABI; where its header is at hand the compiler
 * checks them.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/blas.h"

#include <dlfcn.h>
#include <library_types.h>
#include <pthread.h>

#include "core/model/dtype.h"

enum { OP_N = 0, OP_T = 1, COMPUTE_32F = 68, ALGO_DEFAULT = -1 };

struct calls {
    int (*create)(void **handle);
    int (*destroy)(void *handle);
    int (*set_stream)(void *handle, cudaStream_t stream);
    int (*set_workspace)(void *handle, void *memory, size_t n);
    const char *(*status_name)(int status);
    int (*gemm)(void *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a, int a_type, int lda, const void *b,
                int b_type, int ldb, const void *beta, void *c, int c_type, int ldc, int compute, int algo);
};

#if __has_include(<cublas_v2.h>)
#include <cublas_v2.h>
_Static_assert((int)CUBLAS_OP_N == OP_N && (int)CUBLAS_OP_T == OP_T && (int)CUBLAS_COMPUTE_32F == COMPUTE_32F &&
                   (int)CUBLAS_GEMM_DEFAULT == ALGO_DEFAULT && (int)CUBLAS_STATUS_ALLOC_FAILED == PL_CUBLAS_NO_MEMORY, "cuBLAS's numbers");
_Static_assert(sizeof(cublasHandle_t) == sizeof(void *) && sizeof(cublasOperation_t) == sizeof(int), "cuBLAS's types");
#endif

static struct calls calls; /* the same for every device */
static void *library;      /* that they are of; stays until the process ends */
static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER; /* ranks in threads come at once */

/* cuBLAS counts along columns: what it sees is the transpose of each matrix, and c's is that of b times that of a. */
static int product(const struct pl_cublas *b, const struct pl_cublas_product *p)
{
    const int type = p->dtype == PL_F32 ? CUDA_R_32F : p->dtype == PL_F16 ? CUDA_R_16F : CUDA_R_16BF;
    return calls.gemm(b->handle, p->b.along ? OP_T : OP_N, p->a.along ? OP_N : OP_T, p->n, p->m, p->k, &p->alpha, p->b.p, type, (int)p->b.stride, p->a.p,
                      type, (int)p->a.stride, &p->beta, p->c, CUDA_R_32F, (int)p->stride, COMPUTE_32F, ALGO_DEFAULT);
}

static int work_in(const struct pl_cublas *b, void *memory, size_t n)
{
    return calls.set_workspace(b->handle, memory, n);
}

static const char *status_name(int status)
{
    return calls.status_name(status);
}

static void close_blas(struct pl_cublas *b)
{
    (void)calls.destroy(b->handle);
}

static void *find_library(void)
{
    void *found = dlopen("libcublas.so.13", RTLD_NOW | RTLD_LOCAL);
    return found != NULL ? found : dlopen("/usr/local/cuda/lib64/libcublas.so.13", RTLD_NOW | RTLD_LOCAL);
}

static bool find_calls(void *from)
{
    *(void **)&calls.create = dlsym(from, "cublasCreate_v2");
    *(void **)&calls.destroy = dlsym(from, "cublasDestroy_v2");
    *(void **)&calls.set_stream = dlsym(from, "cublasSetStream_v2");
    *(void **)&calls.set_workspace = dlsym(from, "cublasSetWorkspace_v2");
    *(void **)&calls.status_name = dlsym(from, "cublasGetStatusName");
    *(void **)&calls.gemm = dlsym(from, "cublasGemmEx");
    return calls.create != NULL && calls.destroy != NULL && calls.set_stream != NULL && calls.set_workspace != NULL && calls.status_name != NULL &&
           calls.gemm != NULL;
}

static pl_status load(struct pl_err *err)
{
    if (library != NULL)
        return PL_OK;
    void *found = find_library();
    if (found == NULL)
        return pl_fail(err, PL_ENOTSUP, PL_CUBLAS_MISSING);
    if (!find_calls(found)) {
        dlclose(found);
        return pl_fail(err, PL_ENOTSUP, "libcublas.so.13 lacks a call that parley makes: install CUDA 13's own, or take --device cpu");
    }
    library = found;
    return PL_OK;
}

pl_status pl_cublas_open(struct pl_cublas *b, cudaStream_t stream, struct pl_err *err)
{
    void *handle = NULL;
    pthread_mutex_lock(&loading);
    const pl_status loaded = load(err);
    pthread_mutex_unlock(&loading);
    if (loaded != PL_OK)
        return loaded;
    int e = calls.create(&handle);
    if (e == 0)
        e = calls.set_stream(handle, stream);
    if (e != 0) {
        const pl_status rc = e == PL_CUBLAS_NO_MEMORY ? pl_fail(err, PL_ENOMEM, "the GPU has no memory left for cuBLAS")
                                                      : pl_fail(err, PL_EDEVICE, "cuBLAS does not start: %s (%d)", calls.status_name(e), e);
        if (handle != NULL)
            (void)calls.destroy(handle);
        return rc;
    }
    *b = (struct pl_cublas){.handle = handle, .product = product, .work_in = work_in, .status_name = status_name, .close = close_blas};
    return PL_OK;
}
