/* tmd_generate: a prompt to a video file, in C.
 *
 *     tmd_generate BUNDLE "a red circle moving right on a black background" out.y4m
 *
 * out.y4m is what every player and encoder reads (full-range 4:4:4, so nothing is lost but the rounding of a colour
 * matrix); out.ppm takes a still, the first frame; out.rgb the frames as they are, uint8 [F, H, W, 3].
 *
 * --image first.ppm is a picture of the size of the video: its first frame, or with --strength what a still starts from.
 *
 * Ctrl-C, SIGTERM and SIGHUP end it, in the middle of a graph too, and leave no file behind. */
#define _XOPEN_SOURCE 700 /* sigaction, setitimer */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

#include <tmd/tmd.h>

static const char usage[] =
    "Usage: tmd_generate BUNDLE PROMPT OUT.y4m|OUT.ppm|OUT.rgb [--seed N] [--steps N] [--inner-steps N] [--frames N]\n"
    "                    [--size WxH] [--guidance X] [--deadline SECONDS] [--rho X] [--class N] [--threads N]\n"
    "                    [--image FILE.ppm] [--strength X]\n"
    "                    [--memory auto|all|low] [--engine NAME] [--engine-library FILE] [--plans FOLDER] [--plan-cache FOLDER]\n"
    "PROMPT is \"\" for a model of classes.\n";

static tmd_context* volatile running;
static char* volatile unfinished; /* the file that is being written */
static volatile sig_atomic_t ending; /* the signal that ends the program, 0: none */

/* The first signal stops the run. At a second one, or if an engine that compiles takes longer than a quarter of a second,
 * the process ends here. */
static void on_signal(int number) {
  static const struct itimerval patience = {{0, 0}, {0, 250000}};
  if (ending) {
    if (unfinished) unlink(unfinished);
    _exit(128 + ending);
  }
  if (number == SIGALRM) return; /* nobody is ending: somebody else's */
  ending = number;
  if (running) tmd_cancel(running);
  setitimer(ITIMER_REAL, &patience, NULL);
}

static void watch_signals(void) {
  static const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGALRM};
  struct sigaction action, before;
  size_t i;
  memset(&action, 0, sizeof action);
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;
  for (i = 0; i < sizeof numbers / sizeof *numbers; ++i) {
    /* What the caller ignores (nohup, a job in the background) stays ignored. */
    if (sigaction(numbers[i], NULL, &before) == 0 && before.sa_handler == SIG_IGN && numbers[i] != SIGALRM) continue;
    sigaction(numbers[i], &action, NULL);
  }
}

static int show_progress(void* user, const tmd_progress* progress) {
  (void)user;
  fprintf(stderr, "\r%3.0f %% %-9s %d/%d ", 100 * progress->fraction, tmd_stage_name(progress->stage), progress->step,
          progress->total);
  return ending; /* anything but 0 cancels */
}

static unsigned char clamp(double value) {
  return value <= 0 ? 0 : value >= 255 ? 255 : (unsigned char)(value + 0.5);
}

/* RGB to full-range BT.601 planes (what y4m means by XCOLORRANGE=FULL), one picture after the other. */
static int write_y4m(FILE* file, const unsigned char* rgb, const tmd_plan* plan) {
  const size_t pixels = (size_t)plan->width * (size_t)plan->height;
  unsigned char* planes = malloc(3 * pixels);
  int frame;
  size_t i;
  if (!planes) return 0;
  fprintf(file, "YUV4MPEG2 W%d H%d F%d:1 Ip A1:1 C444 XCOLORRANGE=FULL\n", plan->width, plan->height, plan->fps);
  for (frame = 0; frame < plan->frames; ++frame, rgb += 3 * pixels) {
    for (i = 0; i < pixels; ++i) {
      const double r = rgb[3 * i], g = rgb[3 * i + 1], b = rgb[3 * i + 2];
      const double y = 0.299 * r + 0.587 * g + 0.114 * b;
      planes[i] = clamp(y);
      planes[pixels + i] = clamp(128 + (b - y) / 1.772);
      planes[2 * pixels + i] = clamp(128 + (r - y) / 1.402);
    }
    fprintf(file, "FRAME\n");
    if (fwrite(planes, 1, 3 * pixels, file) != 3 * pixels) break;
  }
  free(planes);
  return frame == plan->frames;
}

static int ends_in(const char* path, const char* end) {
  const size_t length = strlen(path);
  return length > strlen(end) && strcmp(path + length - strlen(end), end) == 0;
}

/* Writes beside `path` first: an older video stays until this one is whole. */
static int write_file(const char* path, const unsigned char* frames, const tmd_plan* plan) {
  const size_t picture = 3 * (size_t)plan->width * (size_t)plan->height;
  char* part = malloc(strlen(path) + sizeof ".part");
  FILE* file;
  int good;
  if (!part) return 0;
  strcat(strcpy(part, path), ".part");
  unfinished = part; /* before it is there: whoever ends the process shall find it */
  file = fopen(part, "wb");
  if (!file) {
    unfinished = NULL;
    free(part);
    return 0;
  }
  if (ends_in(path, ".rgb")) {
    good = fwrite(frames, 1, plan->frames_size, file) == plan->frames_size;
  } else if (ends_in(path, ".ppm")) {
    fprintf(file, "P6\n%d %d\n255\n", plan->width, plan->height);
    good = fwrite(frames, 1, picture, file) == picture;
  } else {
    good = write_y4m(file, frames, plan);
  }
  good = fclose(file) == 0 && good && !ending && rename(part, path) == 0;
  if (!good) unlink(part);
  unfinished = NULL;
  free(part);
  return good;
}

/* The picture in a PPM file (P6, 8 bits, without comments), which must have the size of the plan; NULL: it does not. */
static unsigned char* read_picture(const char* path, const tmd_plan* plan) {
  const size_t size = 3 * (size_t)plan->width * (size_t)plan->height;
  unsigned char* rgb = malloc(size);
  FILE* file = rgb ? fopen(path, "rb") : NULL;
  int width = 0, height = 0, most = 0;
  const int good = file && fscanf(file, "P6 %d %d %d", &width, &height, &most) == 3 && most == 255 &&
                   width == plan->width && height == plan->height && fgetc(file) != EOF &&
                   fread(rgb, 1, size, file) == size;
  if (file) fclose(file);
  if (good) return rgb;
  free(rgb);
  fprintf(stderr, "%s is no picture of %dx%d: save it as PPM (P6) of this size.\n", path, plan->width, plan->height);
  return NULL;
}

/* Its latents, which `run` keeps; they are the caller's to free. */
static tmd_status take_picture(tmd_context* tmd, const char* path, tmd_run_options* run, float** latents) {
  tmd_plan plan;
  unsigned char* rgb = NULL;
  tmd_status status;
  size_t count;
  tmd_plan_init(&plan);
  status = tmd_plan_run(tmd, run, &plan);
  if (status != TMD_OK) return status;
  count = (size_t)plan.channels * (size_t)plan.latent_height * (size_t)plan.latent_width;
  if (!(*latents = malloc(count * sizeof **latents))) return TMD_ERROR_MEMORY;
  if (!(rgb = read_picture(path, &plan))) return TMD_ERROR_USAGE;
  status = tmd_encode_image(tmd, rgb, plan.width, plan.height, *latents, count, NULL);
  run->init_latents = *latents;
  free(rgb);
  return status;
}

static int whole_number(const char* text, long long* value) {
  char* end;
  *value = strtoll(text, &end, 10);
  return end != text && *end == '\0';
}

/* Takes options after the three names; 0 if one of them cannot be understood. */
static int read_options(int count, char** words, tmd_open_options* open, tmd_run_options* run, const char** image) {
  int i;
  for (i = 0; i + 1 < count; i += 2) {
    const char *name = words[i], *value = words[i + 1];
    long long number = 0;
    const int whole = whole_number(value, &number);
    if (!strcmp(name, "--seed") && whole) run->seed = number;
    else if (!strcmp(name, "--steps") && whole) run->steps = (int32_t)number;
    else if (!strcmp(name, "--inner-steps") && whole) run->inner_steps = (int32_t)number;
    else if (!strcmp(name, "--frames") && whole) run->frames = (int32_t)number;
    else if (!strcmp(name, "--size") && sscanf(value, "%dx%d", &run->width, &run->height) == 2) continue;
    else if (!strcmp(name, "--threads") && whole) open->threads = (int32_t)number;
    else if (!strcmp(name, "--guidance")) run->guidance = atof(value);
    else if (!strcmp(name, "--deadline")) run->deadline = atof(value);
    else if (!strcmp(name, "--rho")) run->rho = atof(value);
    else if (!strcmp(name, "--strength")) run->strength = atof(value);
    else if (!strcmp(name, "--image")) *image = value;
    else if (!strcmp(name, "--class") && whole) run->label = (int32_t)number;
    else if (!strcmp(name, "--memory") && !strcmp(value, "auto")) open->memory = TMD_MEMORY_AUTO;
    else if (!strcmp(name, "--memory") && !strcmp(value, "all")) open->memory = TMD_MEMORY_ALL;
    else if (!strcmp(name, "--memory") && !strcmp(value, "low")) open->memory = TMD_MEMORY_LOW;
    else if (!strcmp(name, "--engine")) open->engine = value;
    else if (!strcmp(name, "--engine-library")) open->engine_library = value;
    else if (!strcmp(name, "--plans")) open->plans = value;
    else if (!strcmp(name, "--plan-cache")) open->plan_cache = value;
    else return 0;
  }
  return i == count;
}

int main(int argc, char** argv) {
  tmd_context* tmd = NULL;
  tmd_open_options open;
  tmd_run_options run;
  tmd_plan plan;
  tmd_result result;
  tmd_status status;
  unsigned char* frames = NULL;
  float* picture = NULL;
  const char* image = NULL;
  int stage;

  tmd_open_options_init(&open);
  tmd_run_options_init(&run);
  tmd_plan_init(&plan);
  tmd_result_init(&result);
  if (argc < 4 || !read_options(argc - 4, argv + 4, &open, &run, &image)) {
    fputs(usage, stderr);
    return 2;
  }
  run.on_progress = show_progress;
  if (tmd_create(&tmd) != TMD_OK) return 1;
  running = tmd;
  watch_signals();

  status = tmd_open(tmd, argv[1], &open);
  if (status == TMD_OK && image) status = take_picture(tmd, image, &run, &picture);
  if (status == TMD_OK) status = tmd_plan_run(tmd, &run, &plan);
  if (status == TMD_OK && !(frames = malloc(plan.frames_size))) status = TMD_ERROR_MEMORY;
  if (status == TMD_OK) status = tmd_generate(tmd, argv[2], &run, frames, plan.frames_size, &result);
  fputc('\n', stderr);
  if (status != TMD_OK) {
    if (*tmd_error(tmd)) fprintf(stderr, "%s: %s\n", tmd_status_name(status), tmd_error(tmd));
    else if (status == TMD_ERROR_MEMORY) fprintf(stderr, "out of memory\n");
  } else if (!write_file(argv[3], frames, &plan)) {
    if (!ending) fprintf(stderr, "cannot write %s\n", argv[3]);
    status = TMD_ERROR_USAGE;
  } else {
    fprintf(stderr, "%s", tmd_warnings(tmd));
    printf("%s: %d frames of %dx%d, seed %lld, %d steps,", argv[3], plan.frames, plan.width, plan.height,
           (long long)result.seed, result.steps);
    for (stage = 0; stage < TMD_STAGES; ++stage)
      printf(" %s %.3f s", tmd_stage_name(stage), result.seconds[stage]);
    printf("\n");
  }
  running = NULL;
  free(frames);
  free(picture);
  tmd_free(tmd);
  if (ending) return 128 + ending;
  return status == TMD_OK ? 0 : status == TMD_ERROR_USAGE ? 2 : 1;
}
