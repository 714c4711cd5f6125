/* train_avx2: the kernels of training for AVX2.
 * SPDX-License-Identifier: Apache-2.0 */
#define TILE_NV 1
#include "core/device/cpu/train_vec.h"

const struct pl_train_kernels pl_train_kernels_avx2 = {
    .nv = TILE_NV,
    .tile = {k_tile_f32, NULL},
    .narrow = plain_narrow,
    .interleave = plain_interleave,
    .transpose = plain_transpose,
    .dequant = pl_dequant_row,
    ROW_KERNELS,
};
