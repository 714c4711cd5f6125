/* layouts: the packed layouts that occur (see struct pl_cpu_part), for the macro LAYOUT(bits, sub, has_min, half_scales)
 * that the including file has defined. Included more than once on purpose. With ROWS_BY_GROUP instead, rows_block for functions
 * rows_BITS_SUB_MIN_HALF that take one group of 16 rows of a unit.
 * SPDX-License-Identifier: Apache-2.0 */
#ifdef LAYOUT
LAYOUT(4, 32, 0, 1) /* Q4_0 */
LAYOUT(4, 32, 1, 1) /* Q4_1 */
LAYOUT(8, 32, 0, 1) /* Q5_0, Q8_0 */
LAYOUT(8, 32, 1, 1) /* Q5_1 */
LAYOUT(4, 16, 1, 0) /* Q2_K */
LAYOUT(4, 16, 0, 0) /* Q3_K */
LAYOUT(4, 32, 1, 0) /* Q4_K */
LAYOUT(8, 32, 1, 0) /* Q5_K */
LAYOUT(8, 16, 0, 0) /* Q6_K */
#endif
#ifdef ROWS_BY_GROUP
#undef ROWS_BY_GROUP
static void rows_block(const struct pl_cpu_part *p, uint32_t unit, uint32_t n_groups, const struct pl_cpu_act *x, uint32_t t0,
                       uint32_t n_t, float *out, size_t stride, bool add)
{
    const uint8_t *w = p->packed + unit * p->unit_bytes;
    for (uint32_t g = 0; g < n_groups; g++, out += PL_CPU_GROUP) {
#define LAYOUT(bits_, sub_, has_min_, half_)                                                                           \
        if (p->bits == bits_ && p->sub == sub_ && p->has_min == has_min_ && p->half_scales == half_)                   \
            rows_##bits_##_##sub_##_##has_min_##_##half_(p, w, g, x, t0, n_t, out, stride, add);
#include "core/device/cpu/layouts.h"
#undef LAYOUT
    }
}
#endif
