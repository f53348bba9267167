/* tmd: a prompt in, video frames out. The C interface of the runtime; tmd.hpp is the same for C++.
 *
 *     tmd_context* tmd = NULL;
 *     if (tmd_create(&tmd) != TMD_OK) return 1;                   // out of memory, nothing else
 *     tmd_status status = tmd_open(tmd, "my-bundle", NULL);       // NULL: the defaults of tmd_open_options_init
 *
 *     tmd_run_options options;
 *     tmd_run_options_init(&options);                             // what the bundle was made for, a random seed
 *     options.seed = 1;
 *
 *     tmd_plan plan;
 *     tmd_plan_init(&plan);
 *     if (status == TMD_OK) status = tmd_plan_run(tmd, &options, &plan);          // sizes, before any work
 *     uint8_t* frames = status == TMD_OK ? malloc(plan.frames_size) : NULL;       // RGB, plan.frames pictures
 *     if (status == TMD_OK)
 *       status = tmd_generate(tmd, "a red circle moving right on a black background", &options,
 *                             frames, plan.frames_size, NULL);
 *     if (status != TMD_OK) fprintf(stderr, "%s: %s\n", tmd_status_name(status), tmd_error(tmd));
 *     free(frames);
 *     tmd_free(tmd);
 *
 * Rules that hold for every function
 *
 *   Ownership   Who allocates, frees. A context is made by tmd_create or tmd_clone and freed by tmd_free. Buffers are
 *               the caller's; the library writes into them during the call and keeps no pointer after it. Strings and
 *               arrays inside a description belong to the context and live until tmd_open or tmd_free of that context.
 *   Status      Every call that can fail returns a tmd_status. tmd_error(context) is the text of the last failure:
 *               what happened, why, and what to do. The text is for people; programs look at the status.
 *   On failure  outputs are as they were before the call, and the context stays usable.
 *   Threads     A context serves one thread at a time: a call while another one runs is answered with TMD_ERROR_BUSY.
 *               Different contexts are independent. tmd_clone gives a second thread a context on the same weights.
 *               tmd_cancel is for any thread at any time.
 *   Callbacks   are called on the thread of the running call. They must not throw, and must not call the context that
 *               calls them (TMD_ERROR_BUSY), except tmd_error.
 *   NULL        is allowed only where a comment says what it means; elsewhere it is TMD_ERROR_USAGE.
 *   Text        is UTF-8, ended by a zero byte; paths too.
 *   Structs     that begin with struct_size are prepared by their _init function, always. A program that was compiled
 *               against an older header stays correct with a newer library of the same major version: new fields come
 *               at the end, and the library reads and writes only as many bytes as struct_size says.
 *   Manners     The library throws nothing, ends no process, writes to no stream, installs no signal handler, opens no
 *               connection and reads no environment variable but TMPDIR. Before it loads ONNX Runtime it sets
 *               ORT_DISABLE_TELEMETRY, if that is not set: a host whose threads read the environment meanwhile sets it
 *               itself. It is silent unless tmd_set_log asks for lines.
 *               Its own threads block all signals. The host's locale changes no frame.
 *
 * Numbers: lengths in bytes are size_t; counts are int32_t; TMD_DEFAULT (-1) means "what the bundle says".
 * Layout: row-major, no padding. Frames uint8 [F, H, W, 3], RGB. Latents float32 [C, T, h, w]. Embeddings float32
 * [tokens, dim]. T is (F - 1) / temporal_stride + 1; h and w are H and W over spatial_stride. A Transition Model
 * (family "tim") makes stills: F and T are 1.
 */
#ifndef TMD_TMD_H
#define TMD_TMD_H

#include <stddef.h>
#include <stdint.h>

#if defined(TMD_STATIC)
#define TMD_API
#elif defined(__GNUC__)
#define TMD_API __attribute__((visibility("default")))
#else
#define TMD_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- version ------------------------------------------------------------------------------------------------- */

#define TMD_VERSION_MAJOR 0
#define TMD_VERSION_MINOR 1
#define TMD_VERSION_PATCH 0

/* Version of the library that is running, "0.1.0"; static. */
TMD_API const char* tmd_version(void);

/* One line to paste into a report: version, compiler, and the engines this build knows; static. The version of the
 * engine that is really used is in tmd_description. */
TMD_API const char* tmd_build_info(void);

/* ---- status -------------------------------------------------------------------------------------------------- */

typedef enum tmd_status {
  TMD_OK = 0,
  TMD_ERROR_USAGE = 1,    /* the caller asked for what cannot be had: a size, a step count, an empty prompt, NULL */
  TMD_ERROR_BUNDLE = 2,   /* the bundle is missing, incomplete, damaged, or breaks a rule of docs/bundle.md */
  TMD_ERROR_ENGINE = 3,   /* the engine is not to be found, or cannot load or run a graph */
  TMD_ERROR_RUN = 4,      /* a stage failed: the bundle lacks a graph, or a result holds NaN */
  TMD_ERROR_MEMORY = 5,   /* out of memory */
  TMD_ERROR_BUSY = 6,     /* this context is in use by another call */
  TMD_ERROR_INTERNAL = 7, /* a bug of this library: please report it with tmd_build_info() */
  TMD_CANCELLED = 8       /* a callback or tmd_cancel asked to stop; nothing is wrong */
} tmd_status;

/* "TMD_OK", "TMD_ERROR_USAGE", ...; static, never NULL, whatever the number. */
TMD_API const char* tmd_status_name(int status);

/* ---- contexts ------------------------------------------------------------------------------------------------ */

typedef struct tmd_context tmd_context;

/* A new context with nothing open. Fails only with TMD_ERROR_MEMORY, or TMD_ERROR_USAGE if context is NULL. */
TMD_API tmd_status tmd_create(tmd_context** context);

/* Frees a context and what it owns; weights go when the last clone goes. NULL does nothing. No call may be running. */
TMD_API void tmd_free(tmd_context* context);

/* Text of the last failure on this context; "" if there was none. Valid until the next call on the context. May be
 * called from callbacks. NULL: a fixed text. */
TMD_API const char* tmd_error(const tmd_context* context);

/* Stops the call that runs on this context, which ends with TMD_CANCELLED: an engine in the middle of a graph stops after
 * the operation that it is at, a GPU after its launch. An engine that loads or compiles a graph is not interrupted: the
 * call ends behind that. The context works on. Without a running call, nothing happens; one that is about to end may end
 * as if nobody had asked. For any thread, and for handlers of signals: it takes no lock and no memory. The context must
 * not be freed meanwhile. NULL does nothing. */
TMD_API void tmd_cancel(tmd_context* context);

/* What a finished run would like a person to know ("the prompt is too long ..."), one line each; "" if nothing.
 * Belongs to the last tmd_plan_run, tmd_encode, tmd_denoise, tmd_decode or tmd_generate. Valid until the next call. */
TMD_API const char* tmd_warnings(const tmd_context* context);

typedef enum tmd_log_level {
  TMD_LOG_ERROR = 1,
  TMD_LOG_WARNING = 2,
  TMD_LOG_INFO = 3, /* a bundle opened, a graph loaded */
  TMD_LOG_DEBUG = 4
} tmd_log_level;

typedef void (*tmd_log_fn)(void* user, tmd_log_level level, const char* line);

/* Lines up to `level` go to `log`, on the thread of the running call. log NULL: silence again (the default). Clones
 * made later inherit it. */
TMD_API tmd_status tmd_set_log(tmd_context* context, tmd_log_fn log, void* user, tmd_log_level level);

/* ---- open ---------------------------------------------------------------------------------------------------- */

typedef enum tmd_memory {
  TMD_MEMORY_ALL = 0, /* graphs stay loaded between runs: the first run is cold, later ones are warm */
  TMD_MEMORY_LOW = 1, /* text encoder, denoiser and decoder live one after the other; every run is cold */
  TMD_MEMORY_AUTO = 2 /* LOW for runs that would not fit into the free memory with ALL, by an estimate; else ALL. A run
                         that surely takes more than is free is refused with TMD_ERROR_MEMORY, and one whose graphs do
                         not tell how much they take with TMD_ERROR_BUNDLE; the others try it all the same. */
} tmd_memory;

typedef struct tmd_open_options {
  size_t struct_size;
  const char* engine;         /* "openvino"; "onnxruntime"; "tensorrt-rtx", "tensorrt" (NVIDIA GPUs, of consumers and of
                               * servers; they run the plans that tmd-engine build made); "auto" or NULL: the first of
                               * them whose library is there */
  const char* device;         /* "cpu"; "cuda"; NULL: the engine's own */
  int32_t threads;            /* CPU threads of one run, 1 to 1024, of which at most as many as the machine has processors
                               * are used (tmd_warnings says so); TMD_DEFAULT: 2 for models of up to 64 MiB, so that one
                               * seed gives one video on every machine; for larger ones what a container's quota of
                               * processors is worth, and without a quota the engine decides */
  int32_t memory;             /* a tmd_memory; the default is TMD_MEMORY_AUTO */
  const char* engine_library; /* path of the engine's shared library (libopenvino_c.so..., libonnxruntime.so...,
                               * libtensorrt_rtx.so..., libnvinfer.so...); NULL: searched for, first beside this library, then by the system's
                               * loader, then where it was at build time */
  const char* plan_cache;     /* "tensorrt-rtx", "tensorrt": the folder of compiled graphs that tmd-engine build was told
                               * in TMD_CACHE; NULL: ~/.cache/tmd. "tensorrt-rtx" also keeps compiled kernels there */
  const char* plans;          /* the same engines: a folder that tmd-engine build --out made, which is looked into first.
                               * Plans are code: name only a folder that you trust. NULL: none */
} tmd_open_options;

#define TMD_DEFAULT (-1)

TMD_API void tmd_open_options_init(tmd_open_options* options);

/* Opens the bundle in the folder `path`. Every file is checked here, sha256 included (about 0.6 s per GB); graphs are
 * loaded by the stages that need them. Replaces what the context had open, if it succeeds. options NULL: defaults. */
TMD_API tmd_status tmd_open(tmd_context* context, const char* path, const tmd_open_options* options);

/* A second context on the same bundle, engine and weights, for another thread. Buffers are its own. Graphs that one of
 * them has loaded are there for all. The caller frees it; the order of freeing does not matter. */
TMD_API tmd_status tmd_clone(tmd_context* context, tmd_context** clone);

/* ---- describe ------------------------------------------------------------------------------------------------ */

typedef struct tmd_description {
  size_t struct_size;
  const char* name;               /* of the model, "tiny" */
  const char* family;             /* "tmd": with inner steps; "wan": without; "tim": stills, in jumps of any length */
  const char* architecture;       /* the network it was made from, "wan2.1-t2v" or "wan2.2-ti2v" */
  const char* rule;               /* update rule: "euler", "renoise", "unipc", "flow_map" */
  const char* source;             /* where the weights come from, as the bundle says; nobody has signed it */
  const char* engine;             /* "openvino", "onnxruntime", "tensorrt-rtx" or "tensorrt" */
  const char* engine_version;     /* as the engine's library names itself */
  int32_t steps, inner_steps;     /* defaults; inner_steps is 1 except for family "tmd" */
  const int32_t* allowed_steps;   /* allowed_steps_count of them, ascending; NULL: any from 1 to 1000 */
  int32_t allowed_steps_count;
  const int32_t* allowed_inner_steps;
  int32_t allowed_inner_steps_count;
  int32_t frames, width, height, fps; /* default video */
  int32_t channels, temporal_stride, spatial_stride; /* of the latents */
  int32_t width_multiple, height_multiple;           /* sizes must be multiples of these; frames 1 plus a multiple of
                                                      * temporal_stride */
  int32_t text_tokens, text_dim;  /* embeddings are [text_tokens, text_dim], of some models shorter: see tmd_encode */
  int32_t can_encode, can_denoise, can_decode; /* whether the bundle has the graphs for it, 0 or 1 */
  int32_t can_encode_image;       /* the same */
  int32_t classes;                /* of a model of numbered classes, which takes no prompt; else 0 */
  int32_t first_frame;            /* 1: a run takes init_latents, without a strength, as the first frame of its video */
} tmd_description;

TMD_API void tmd_description_init(tmd_description* description);

/* What is open. Its strings and arrays belong to the context. */
TMD_API tmd_status tmd_describe(tmd_context* context, tmd_description* description);

/* ---- run ----------------------------------------------------------------------------------------------------- */

typedef enum tmd_stage {
  TMD_STAGE_LOAD = 0,      /* a graph was loaded by the engine */
  TMD_STAGE_TEXT = 1,
  TMD_STAGE_NOISE = 2,     /* has a time, and no progress of its own */
  TMD_STAGE_BACKBONE = 3,  /* outer steps; for family "tim" once, what depends on the prompt alone */
  TMD_STAGE_FLOW_HEAD = 4, /* inner steps; for family "wan" the second half of a step, for "tim" the whole */
  TMD_STAGE_DECODE = 5,    /* latent frames, or tiles of a large still */
  TMD_STAGE_ENCODE = 6     /* a picture to latents; has a time, and no progress of its own */
} tmd_stage;

#define TMD_STAGES 7 /* how many stages there are */

/* "load", "text", "noise", "backbone", "flow_head", "decode", "encode"; static, never NULL. */
TMD_API const char* tmd_stage_name(int stage);

typedef struct tmd_progress {
  size_t struct_size;
  tmd_stage stage;
  int32_t step;     /* 1 to total: this many steps of the stage are over */
  int32_t total;
  double seconds;   /* of the step that is just over */
  double fraction;  /* of the whole call, by counted steps: 0 to 1, never falling */
} tmd_progress;

/* Called after each step. Returns 0 to go on; anything else ends the call with TMD_CANCELLED. A callback ends by
 * returning: longjmp out of it would leave the library's locks taken and its memory behind. */
typedef int (*tmd_progress_fn)(void* user, const tmd_progress* progress);

/* Called with `count` pictures from number `first` on, uint8 [count, height, width, 3], as they are decoded. The memory
 * is the library's and valid during the callback. Returns 0 to go on; anything else ends the call (TMD_CANCELLED). */
typedef int (*tmd_frames_fn)(void* user, const uint8_t* frames, int32_t first, int32_t count, int32_t width,
                             int32_t height);

#define TMD_RANDOM_SEED (-1)

typedef struct tmd_run_options {
  size_t struct_size;
  int64_t seed;          /* 0 to 2^32 - 1, which is all that torch's generator reads. TMD_RANDOM_SEED: drawn, in the result */
  int32_t steps;         /* outer steps, or TMD_DEFAULT */
  int32_t inner_steps;   /* inner steps of each, or TMD_DEFAULT */
  int32_t frames;        /* or TMD_DEFAULT */
  int32_t width, height; /* pixels; both or neither TMD_DEFAULT */
  double guidance;       /* but for "tmd": weight of classifier-free guidance, 1: none; below 0: the bundle's */
  double shift;          /* "anyflow", and "wan" with a free time grid: its warp, 1 or more; below 0: the bundle's */
  const char* negative_prompt; /* with guidance; NULL: the bundle's */
  tmd_progress_fn on_progress; /* NULL: none */
  tmd_frames_fn on_frames;     /* NULL: none; called by tmd_generate and tmd_decode */
  void* user;                  /* handed to all three */
  /* schedule and deadline for families "tim" and "anyflow", label, rho and strength for "tim" only; init_latents for
   * "tim" and where tmd_description says first_frame */
  int32_t label;               /* the class to draw, of a model of classes; else TMD_DEFAULT */
  int32_t schedule_count;      /* of schedule */
  const double* schedule;      /* times that fall from 1 (or strength) to 0, in the place of steps; NULL: equal steps */
  double deadline;             /* seconds from the first noise to the last latents: as many steps as fit, at most
                                * `steps` (1000), the last one a jump to 0; below 0: none */
  double rho;                  /* share of its noise that a step between the first and the last renews; below 0: the
                                * bundle's */
  double strength;             /* with init_latents: the time at which a run from a picture begins, 0.3 changes little
                                * of it, 1 everything; below 0: none */
  const float* init_latents;   /* the picture, channels * latent_height * latent_width floats (of the plan) from
                                * tmd_encode_image: what a run with a strength starts from, or the first frame of the
                                * video; NULL: from noise alone */
  /* for all families */
  tmd_frames_fn on_preview;    /* gets in each step but the last what the run would give if it ended there, in pieces that
                                * begin at picture 0 anew; costs a decoding, and for family "tim" an evaluation. Needs
                                * the decoder beside the model, so not TMD_MEMORY_LOW, and no deadline. NULL: none;
                                * called by tmd_generate and tmd_denoise */
} tmd_run_options;

TMD_API void tmd_run_options_init(tmd_run_options* options);

typedef struct tmd_plan {
  size_t struct_size;
  int32_t steps, inner_steps;
  int32_t frames, width, height, fps;
  int32_t channels, latent_frames, latent_height, latent_width;
  size_t frames_size;     /* bytes of all frames: frames * height * width * 3 */
  size_t latents_count;   /* floats of the latents */
  size_t embeds_count;    /* floats of the embeddings of tmd_encode */
  double nfe;             /* evaluations of the whole model that this run is worth */
} tmd_plan;

TMD_API void tmd_plan_init(tmd_plan* plan);

/* What a run with these options will be, or why it cannot be; loads nothing. options NULL: defaults. */
TMD_API tmd_status tmd_plan_run(tmd_context* context, const tmd_run_options* options, tmd_plan* plan);

typedef struct tmd_result {
  size_t struct_size;
  int64_t seed;
  double seconds[TMD_STAGES]; /* per tmd_stage; TMD_STAGE_LOAD is 0 in a warm run */
  int32_t dropped_tokens;     /* tokens of the prompt that did not fit */
  int32_t tokens;             /* rows that tmd_encode wrote; else 0 */
  int32_t steps;              /* steps that were taken: with a deadline, as many as there was time for */
  int32_t times_count;        /* of times */
  const double* times;        /* families "tim", "anyflow": the times that the run went through, as a schedule that repeats it; valid
                               * until the next call on the context. NULL: of another family */
} tmd_result;

TMD_API void tmd_result_init(tmd_result* result);

/* Prompt to frames. `frames` takes plan.frames_size bytes (`frames_size` is what it has) and is written when the whole
 * video is there; NULL with frames_size 0: frames go to options->on_frames only. result NULL: not wanted. A model of
 * classes takes options->label, and NULL for the prompt. */
TMD_API tmd_status tmd_generate(tmd_context* context, const char* prompt, const tmd_run_options* options,
                                uint8_t* frames, size_t frames_size, tmd_result* result);

/* ---- the stages, one by one ---------------------------------------------------------------------------------- */

/* Prompt to token ids, marks and padding included: int64 [text_tokens]. `dropped` (NULL: not wanted) tokens did not fit.
 * Needs a tokenizer in the bundle, and no engine. */
TMD_API tmd_status tmd_tokenize(tmd_context* context, const char* prompt, int64_t* ids, size_t ids_count,
                                int32_t* dropped);

/* Prompt to embeddings, float32 [text_tokens, text_dim]; embeds_count is the number of floats that `embeds` has. Of a
 * model whose prompts keep their own length result->tokens rows are written, and the others stay as they are. */
TMD_API tmd_status tmd_encode(tmd_context* context, const char* prompt, float* embeds, size_t embeds_count,
                              tmd_result* result);

/* Embeddings [tokens, text_dim] to latents of plan.latents_count floats. `negative_embeds` (same shape) is for guidance,
 * else NULL; NULL with guidance: the empty prompt's, where the bundle has them. A model of classes takes no embeddings:
 * NULL and 0 tokens. Latents are normalised: mean 0, deviation 1 per channel. */
TMD_API tmd_status tmd_denoise(tmd_context* context, const float* embeds, const float* negative_embeds, int32_t tokens,
                               const tmd_run_options* options, float* latents, size_t latents_count,
                               tmd_result* result);

/* Latents [channels, latent_frames, latent_height, latent_width] to frames; `frames` and `frames_size` as for
 * tmd_generate. Of the options only the callbacks count; NULL: none. */
TMD_API tmd_status tmd_decode(tmd_context* context, const float* latents, int32_t latent_frames, int32_t latent_height,
                              int32_t latent_width, const tmd_run_options* options, uint8_t* frames,
                              size_t frames_size, tmd_result* result);

/* A picture, uint8 [height, width, 3], to the latents for options->init_latents: float32 [channels, 1,
 * height / spatial_stride, width / spatial_stride]. Both lengths are multiples of spatial_stride: scale it before. */
TMD_API tmd_status tmd_encode_image(tmd_context* context, const uint8_t* rgb, int32_t width, int32_t height,
                                    float* latents, size_t latents_count, tmd_result* result);

/* Gives back the memory of loaded graphs and buffers; weights that a clone uses stay. The next run loads again. */
TMD_API tmd_status tmd_unload(tmd_context* context);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* TMD_TMD_H */
