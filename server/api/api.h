/* api: the request handlers, one family per file. Contract: pl_http_handler in http.h.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_API_API_H
#define PL_SERVER_API_API_H

#include "server/http.h"

pl_http_handler pl_api_chat, pl_api_completions;
pl_http_handler pl_api_models, pl_api_model;
pl_http_handler pl_api_load_adapter, pl_api_unload_adapter, pl_api_adapters;
pl_http_handler pl_api_tokenize, pl_api_detokenize, pl_api_apply_template;
pl_http_handler pl_api_health, pl_api_metrics, pl_api_version;

#endif
