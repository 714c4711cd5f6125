/* vec_lora: the kernels of low-rank changes for every vector instruction set, over the lanes of vec.h. The including file
 * has also defined LORA_X and LORA_R, the sizes of a tile.
 *
 * Each result is one sum in a fixed order: down, lane by lane over the inputs, then the lanes, then the inputs that fill no
 * vector; up, over the rank. How many rows go together changes nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_DEVICE_CPU_VEC_LORA_H
#define PL_DEVICE_CPU_VEC_LORA_H

#define INLINE static inline __attribute__((always_inline))

INLINE void down_tile(const float *const *x, uint32_t n_x, const float *a, uint32_t n_a, uint32_t cols, float *y, size_t stride)
{
    vf acc[LORA_X][2 * LORA_R];
    uint32_t k = 0;
    for (uint32_t i = 0; i < n_x; i++)
        for (uint32_t r = 0; r < n_a; r++)
            acc[i][r] = vf_set(0.f);
    for (; k + VF <= cols; k += VF) {
        vf v[LORA_X];
        for (uint32_t i = 0; i < n_x; i++)
            v[i] = vf_load(x[i] + k);
        for (uint32_t r = 0; r < n_a; r++) {
            vf w = vf_load(a + (size_t)r * cols + k);
            for (uint32_t i = 0; i < n_x; i++)
                acc[i][r] = vf_fma(v[i], w, acc[i][r]);
        }
    }
    for (uint32_t i = 0; i < n_x; i++)
        for (uint32_t r = 0; r < n_a; r++) {
            float sum = vf_sum(acc[i][r]);
            for (uint32_t j = k; j < cols; j++)
                sum += x[i][j] * a[(size_t)r * cols + j];
            y[i * stride + r] = sum;
        }
}

INLINE void down_rows(const float *const *x, uint32_t n_x, uint32_t tile, const float *a, uint32_t n_a, uint32_t cols, float *y, size_t stride)
{
    uint32_t r = 0;
    for (; r + tile <= n_a; r += tile)
        down_tile(x, n_x, a + (size_t)r * cols, tile, cols, y + r, stride);
    for (; r < n_a; r++)
        down_tile(x, n_x, a + (size_t)r * cols, 1, cols, y + r, stride);
}

static void vec_lora_down(const float *const *x, uint32_t n_x, const float *a, uint32_t n_a, uint32_t cols, float *y, size_t stride)
{
    uint32_t i = 0;
    for (; i + LORA_X <= n_x; i += LORA_X)
        down_rows(x + i, LORA_X, LORA_R, a, n_a, cols, y + i * stride, stride);
    for (; i < n_x; i++)
        down_rows(x + i, 1, 2 * LORA_R, a, n_a, cols, y + i * stride, stride);
}

INLINE void up_tile(float *const *out, uint32_t n_x, const float *y, size_t stride, const float *bt, size_t bt_stride, uint32_t rank,
                    uint32_t at, uint32_t n_c)
{
    vf acc[LORA_X][2 * LORA_R];
    for (uint32_t i = 0; i < n_x; i++)
        for (uint32_t c = 0; c < n_c; c++)
            acc[i][c] = vf_set(0.f);
    for (uint32_t r = 0; r < rank; r++) {
        vf v[LORA_X];
        for (uint32_t i = 0; i < n_x; i++)
            v[i] = vf_set(y[i * stride + r]);
        for (uint32_t c = 0; c < n_c; c++) {
            vf w = vf_load(bt + r * bt_stride + at + c * VF);
            for (uint32_t i = 0; i < n_x; i++)
                acc[i][c] = vf_fma(v[i], w, acc[i][c]);
        }
    }
    for (uint32_t i = 0; i < n_x; i++)
        for (uint32_t c = 0; c < n_c; c++)
            vf_store(out[i] + at + c * VF, vf_add(vf_load(out[i] + at + c * VF), acc[i][c]));
}

INLINE void up_rows(float *const *out, uint32_t n_x, uint32_t tile, const float *y, size_t stride, const float *bt, size_t bt_stride,
                    uint32_t rank, uint32_t n)
{
    uint32_t c = 0;
    for (; c + tile * VF <= n; c += tile * VF)
        up_tile(out, n_x, y, stride, bt, bt_stride, rank, c, tile);
    for (; c + VF <= n; c += VF)
        up_tile(out, n_x, y, stride, bt, bt_stride, rank, c, 1);
    for (; c < n; c++)
        for (uint32_t i = 0; i < n_x; i++) {
            float sum = 0;
            for (uint32_t r = 0; r < rank; r++)
                sum += y[i * stride + r] * bt[r * bt_stride + c];
            out[i][c] += sum;
        }
}

static void vec_lora_up(float *const *out, uint32_t n_x, const float *y, size_t stride, const float *bt, size_t bt_stride, uint32_t rank,
                        uint32_t n)
{
    uint32_t i = 0;
    for (; i + LORA_X <= n_x; i += LORA_X)
        up_rows(out + i, LORA_X, LORA_R, y + i * stride, stride, bt, bt_stride, rank, n);
    for (; i < n_x; i++)
        up_rows(out + i, 1, 2 * LORA_R, y + i * stride, stride, bt, bt_stride, rank, n);
}

#undef INLINE

#endif
