/* The interface as C sees it: sizes and places that compiled programs rely on, and what happens to misuse. */
#include <stdio.h>
#include <string.h>

#include <tmd/tmd.h>

/* 64-bit layouts. A field that is added comes at the end, and only the size at the end of these lists changes. */
#define AT(type, field, offset) _Static_assert(offsetof(type, field) == (offset), #type "." #field " has moved")
#define SIZE(type, size) _Static_assert(sizeof(type) == (size), "the size of " #type " has changed")
#if UINTPTR_MAX == 0xFFFFFFFFFFFFFFFF
AT(tmd_open_options, struct_size, 0);
AT(tmd_open_options, engine, 8);
AT(tmd_open_options, device, 16);
AT(tmd_open_options, threads, 24);
AT(tmd_open_options, memory, 28);
AT(tmd_open_options, engine_library, 32);
AT(tmd_open_options, plan_cache, 40);
AT(tmd_open_options, plans, 48);
SIZE(tmd_open_options, 56);

AT(tmd_description, name, 8);
AT(tmd_description, family, 16);
AT(tmd_description, architecture, 24);
AT(tmd_description, rule, 32);
AT(tmd_description, source, 40);
AT(tmd_description, engine, 48);
AT(tmd_description, engine_version, 56);
AT(tmd_description, steps, 64);
AT(tmd_description, inner_steps, 68);
AT(tmd_description, allowed_steps, 72);
AT(tmd_description, allowed_steps_count, 80);
AT(tmd_description, allowed_inner_steps, 88);
AT(tmd_description, allowed_inner_steps_count, 96);
AT(tmd_description, frames, 100);
AT(tmd_description, width, 104);
AT(tmd_description, height, 108);
AT(tmd_description, fps, 112);
AT(tmd_description, channels, 116);
AT(tmd_description, temporal_stride, 120);
AT(tmd_description, spatial_stride, 124);
AT(tmd_description, width_multiple, 128);
AT(tmd_description, height_multiple, 132);
AT(tmd_description, text_tokens, 136);
AT(tmd_description, text_dim, 140);
AT(tmd_description, can_encode, 144);
AT(tmd_description, can_denoise, 148);
AT(tmd_description, can_decode, 152);
AT(tmd_description, can_encode_image, 156);
AT(tmd_description, classes, 160);
AT(tmd_description, first_frame, 164);
SIZE(tmd_description, 168);

AT(tmd_progress, stage, 8);
AT(tmd_progress, step, 12);
AT(tmd_progress, total, 16);
AT(tmd_progress, seconds, 24);
AT(tmd_progress, fraction, 32);
SIZE(tmd_progress, 40);

AT(tmd_run_options, seed, 8);
AT(tmd_run_options, steps, 16);
AT(tmd_run_options, inner_steps, 20);
AT(tmd_run_options, frames, 24);
AT(tmd_run_options, width, 28);
AT(tmd_run_options, height, 32);
AT(tmd_run_options, guidance, 40);
AT(tmd_run_options, shift, 48);
AT(tmd_run_options, negative_prompt, 56);
AT(tmd_run_options, on_progress, 64);
AT(tmd_run_options, on_frames, 72);
AT(tmd_run_options, user, 80);
AT(tmd_run_options, label, 88);
AT(tmd_run_options, schedule_count, 92);
AT(tmd_run_options, schedule, 96);
AT(tmd_run_options, deadline, 104);
AT(tmd_run_options, rho, 112);
AT(tmd_run_options, strength, 120);
AT(tmd_run_options, init_latents, 128);
AT(tmd_run_options, on_preview, 136);
SIZE(tmd_run_options, 144);

AT(tmd_plan, steps, 8);
AT(tmd_plan, inner_steps, 12);
AT(tmd_plan, frames, 16);
AT(tmd_plan, width, 20);
AT(tmd_plan, height, 24);
AT(tmd_plan, fps, 28);
AT(tmd_plan, channels, 32);
AT(tmd_plan, latent_frames, 36);
AT(tmd_plan, latent_height, 40);
AT(tmd_plan, latent_width, 44);
AT(tmd_plan, frames_size, 48);
AT(tmd_plan, latents_count, 56);
AT(tmd_plan, embeds_count, 64);
AT(tmd_plan, nfe, 72);
SIZE(tmd_plan, 80);

AT(tmd_result, seed, 8);
AT(tmd_result, seconds, 16);
AT(tmd_result, dropped_tokens, 72);
AT(tmd_result, tokens, 76);
AT(tmd_result, steps, 80);
AT(tmd_result, times_count, 84);
AT(tmd_result, times, 88);
SIZE(tmd_result, 96);
#endif

#define IS(name, value) _Static_assert((name) == (value), #name " has another value")
IS(TMD_OK, 0);
IS(TMD_ERROR_USAGE, 1);
IS(TMD_ERROR_BUNDLE, 2);
IS(TMD_ERROR_ENGINE, 3);
IS(TMD_ERROR_RUN, 4);
IS(TMD_ERROR_MEMORY, 5);
IS(TMD_ERROR_BUSY, 6);
IS(TMD_ERROR_INTERNAL, 7);
IS(TMD_CANCELLED, 8);
IS(TMD_LOG_ERROR, 1);
IS(TMD_LOG_WARNING, 2);
IS(TMD_LOG_INFO, 3);
IS(TMD_LOG_DEBUG, 4);
IS(TMD_MEMORY_ALL, 0);
IS(TMD_MEMORY_LOW, 1);
IS(TMD_MEMORY_AUTO, 2);
IS(TMD_STAGE_LOAD, 0);
IS(TMD_STAGE_TEXT, 1);
IS(TMD_STAGE_NOISE, 2);
IS(TMD_STAGE_BACKBONE, 3);
IS(TMD_STAGE_FLOW_HEAD, 4);
IS(TMD_STAGE_DECODE, 5);
IS(TMD_STAGE_ENCODE, 6);
IS(TMD_STAGES, TMD_STAGE_ENCODE + 1);
IS(TMD_DEFAULT, -1);
IS(TMD_RANDOM_SEED, -1);
_Static_assert(sizeof(tmd_status) == 4 && sizeof(tmd_stage) == 4, "enumerations are 4 bytes");

static int failures = 0;
#define CHECK(condition) \
  if (!(condition)) fprintf(stderr, "line %d: %s\n", __LINE__, #condition), ++failures

static int lines = 0;
static void count_lines(void* user, tmd_log_level level, const char* line) {
  CHECK(user == &lines && level == TMD_LOG_ERROR && strlen(line) > 10);
  ++lines;
}

int main(void) {
  tmd_context* tmd = NULL;
  tmd_context* clone = NULL;
  tmd_open_options open;
  tmd_run_options run;
  tmd_plan plan;
  tmd_description description;
  unsigned char frame[3] = {7, 7, 7};
  float number = 7;
  int stage;

  CHECK(strcmp(tmd_version(), "0.1.0") == 0);
  CHECK(strstr(tmd_build_info(), tmd_version()) != NULL);
  CHECK(strcmp(tmd_status_name(TMD_CANCELLED), "TMD_CANCELLED") == 0);
  for (stage = 0; stage < TMD_STAGES; ++stage) CHECK(strcmp(tmd_stage_name(stage), tmd_stage_name(99)) != 0);
  CHECK(strcmp(tmd_stage_name(TMD_STAGES), tmd_stage_name(99)) == 0);
  CHECK(strlen(tmd_status_name(99)) > 0 && strlen(tmd_stage_name(99)) > 0);
  CHECK(tmd_create(NULL) == TMD_ERROR_USAGE);
  CHECK(tmd_create(&tmd) == TMD_OK && tmd != NULL);
  CHECK(strcmp(tmd_error(tmd), "") == 0 && strcmp(tmd_warnings(tmd), "") == 0);

  /* NULL where it is not allowed. */
  CHECK(strlen(tmd_error(NULL)) > 0);
  CHECK(tmd_open(NULL, "x", NULL) == TMD_ERROR_USAGE);
  CHECK(tmd_open(tmd, NULL, NULL) == TMD_ERROR_USAGE);
  CHECK(tmd_generate(tmd, NULL, NULL, frame, 3, NULL) == TMD_ERROR_USAGE);
  tmd_free(NULL);
  tmd_open_options_init(NULL);
  tmd_run_options_init(NULL);
  tmd_plan_init(NULL);
  tmd_result_init(NULL);
  tmd_description_init(NULL);

  /* Nothing is open: every call says so, and leaves outputs alone. */
  tmd_plan_init(&plan);
  tmd_description_init(&description);
  CHECK(tmd_plan_run(tmd, NULL, &plan) == TMD_ERROR_USAGE && plan.frames == 0);
  CHECK(strstr(tmd_error(tmd), "tmd_open") != NULL);
  CHECK(tmd_describe(tmd, &description) == TMD_ERROR_USAGE && description.name == NULL);
  CHECK(tmd_clone(tmd, &clone) == TMD_ERROR_USAGE && clone == NULL);
  CHECK(tmd_generate(tmd, "x", NULL, frame, 3, NULL) == TMD_ERROR_USAGE && frame[0] == 7);
  CHECK(tmd_encode(tmd, "x", &number, 1, NULL) == TMD_ERROR_USAGE && number == 7);
  CHECK(tmd_unload(tmd) == TMD_ERROR_USAGE);
  tmd_cancel(NULL);
  tmd_cancel(tmd); /* nothing runs */

  /* A struct that nobody prepared, and wishes that no engine has. */
  memset(&open, 0, sizeof open);
  CHECK(tmd_open(tmd, "/", &open) == TMD_ERROR_USAGE && strstr(tmd_error(tmd), "_init") != NULL);
  tmd_open_options_init(&open);
  CHECK(open.struct_size == sizeof open && open.threads == TMD_DEFAULT);
  open.memory = 5;
  CHECK(tmd_open(tmd, "/", &open) == TMD_ERROR_USAGE);
  tmd_run_options_init(&run);
  CHECK(run.seed == TMD_RANDOM_SEED && run.steps == TMD_DEFAULT && run.on_progress == NULL);

  /* The log is silent until it is asked for. */
  CHECK(tmd_open(tmd, "/no/such/bundle", NULL) == TMD_ERROR_BUNDLE && lines == 0);
  CHECK(tmd_set_log(tmd, count_lines, &lines, TMD_LOG_DEBUG) == TMD_OK);
  CHECK(tmd_open(tmd, "/no/such/bundle", NULL) == TMD_ERROR_BUNDLE && lines == 1);
  tmd_free(tmd);
  return failures != 0;
}
