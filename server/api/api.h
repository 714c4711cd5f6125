/* api: the request handlers, one family per file. Contract: pl_http_handler in http.h.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SERVER_API_API_H
#define PL_SERVER_API_API_H

#include "server/http.h"

pl_http_handler pl_api_chat, pl_api_completions;
pl_http_handler pl_api_models, pl_api_model;
pl_http_handler pl_api_load_adapter, pl_api_unload_adapter, pl_api_adapters;
pl_http_handler pl_api_tokenize, pl_api_detokenize, pl_api_apply_template;
pl_http_handler pl_api_model_delete;
pl_http_handler pl_api_files_create, pl_api_files_list, pl_api_files_get, pl_api_files_content, pl_api_files_delete;
pl_http_handler pl_api_jobs_create, pl_api_jobs_validate, pl_api_jobs_list, pl_api_jobs_get, pl_api_jobs_cancel, pl_api_jobs_pause, pl_api_jobs_resume;
pl_http_handler pl_api_jobs_events, pl_api_jobs_checkpoints;
pl_http_handler pl_api_uploads_create, pl_api_uploads_part, pl_api_uploads_complete, pl_api_uploads_cancel;
pl_http_handler pl_api_permissions_create, pl_api_permissions_list, pl_api_permissions_delete;
struct pl_sink *pl_api_uploads_sink(struct pl_http_req *req, const char *content_type);
struct pl_sink *pl_api_files_sink(struct pl_http_req *req, const char *content_type);
pl_http_handler pl_api_health, pl_api_metrics, pl_api_version;

#endif
