/* train_kernels: the launchers of training's kernels; what kernels.h says holds for them. Every sum runs in a fixed order: no atomics.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CUDA_TRAIN_KERNELS_H
#define PL_CUDA_TRAIN_KERNELS_H

#include "cuda/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- train_mm.cu: around cuBLAS ---------------------------------------------------------------------------------------------- */

/* ---- train_rows.cu: row by row ------------------------------------------------------------------------------------------------ */

/* ---- train_attn.cu ------------------------------------------------------------------------------------------------------------ */

#ifdef __cplusplus
}
#endif

#endif
