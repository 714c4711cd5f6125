/* plan: which sequences get how many tokens of the next iteration.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/sched/plan.h"

uint32_t pl_plan(struct pl_plan_item *items, uint32_t n, uint32_t budget, uint32_t beside)
{
    uint32_t used = 0;
    for (uint32_t i = 0; i < n; i++) {
        items[i].take = items[i].left == 1 && used < budget;
        used += items[i].take;
    }
    uint32_t room = budget - used;
    if (used > 0 && room > beside)
        room = beside;
    for (uint32_t i = 0; i < n && room > 0; i++) {
        if (items[i].left <= 1)
            continue;
        items[i].take = items[i].left < room ? items[i].left : room;
        room -= items[i].take;
        used += items[i].take;
    }
    return used;
}
