// What the page knows of the videos on the server: kept fresh by asking, and by the events of the one that runs.

import * as api from "./api.js";

const ASK_SECONDS = 3;
const ASLEEP_SECONDS = 20;
const STREAMS = 2; // a browser opens six connections to one place, and the page needs some for files

/**
 * `on.change()` after each change, `on.progress(video)` while one is made, `on.done(video)` when one is over,
 * `on.online(yes, error)` when the server comes or goes.
 */
export class Jobs {
  constructor(on) {
    this.on = on;
    this.all = new Map();
    this.previews = new Map();
    this.hasMore = false;
    this.streams = new Map();
    this.timer = null;
    this.online = null;
    this.counter = 0;
    document.addEventListener("visibilitychange", () => document.hidden || this.refresh());
    addEventListener("online", () => this.refresh());
  }

  /** Videos that are waiting or being made, in the order in which they will be done. */
  get unfinished() {
    const running = (video) => (video.status === "in_progress" ? 0 : 1);
    return this.sorted((video) => !api.isOver(video)).sort(
      (a, b) => running(a) - running(b) || a.created_at - b.created_at || this.place(a) - this.place(b),
    );
  }

  /** Videos that are over, the newest first. */
  get finished() {
    return this.sorted(api.isOver);
  }

  sorted(fits) {
    return [...this.all.values()].filter(fits).sort((a, b) => b.created_at - a.created_at || b.order - a.order);
  }

  place(video) {
    return video.tmd.queue_position ?? 0;
  }

  /** Asks for the newest videos, and again after a while. */
  async refresh() {
    clearTimeout(this.timer);
    try {
      const page = await api.videos();
      const seen = new Set(page.data.map((video) => video.id));
      const oldest = page.data.at(-1)?.created_at ?? 0;
      for (const [id, video] of this.all) {
        // One that should have been among them was deleted elsewhere.
        if (!seen.has(id) && (!page.has_more || video.created_at > oldest)) this.forget(id);
      }
      page.data.toReversed().forEach((video) => this.put(video));
      if (this.online !== true) this.hasMore = page.has_more;
      this.setOnline(true);
    } catch (error) {
      this.setOnline(false, error);
      if (error.status === 401) return;
    }
    this.on.change();
    this.follow();
    const seconds = document.hidden ? ASLEEP_SECONDS : ASK_SECONDS;
    clearTimeout(this.timer); // another one may have come in between
    this.timer = setTimeout(() => this.refresh(), 1000 * seconds);
  }

  async older() {
    const last = this.finished.at(-1);
    const page = await api.videos(last?.id);
    page.data.forEach((video) => this.put(video, true));
    this.hasMore = page.has_more;
    this.on.change();
  }

  setOnline(yes, error = null) {
    if (this.online !== yes || error?.status === 401) this.on.online(yes, error);
    this.online = yes;
  }

  /** Takes in a video as the server has it. */
  put(video, old = false) {
    const before = this.all.get(video.id);
    this.counter += 1;
    video.order = before?.order ?? (old ? -this.counter : this.counter);
    if (before?.status === "in_progress" && video.status === "in_progress")
      video.progress = Math.max(video.progress, before.progress);
    this.all.set(video.id, video);
    if (before && !api.isOver(before) && api.isOver(video)) {
      this.previews.delete(video.id);
      this.on.done(video);
    }
  }

  forget(id) {
    this.streams.get(id)?.abort();
    this.all.delete(id);
    this.previews.delete(id);
    api.forgetFiles(id);
  }

  /** Listens to the videos that are being made, and to the next one. */
  follow() {
    for (const { id } of this.unfinished.slice(0, STREAMS)) {
      if (this.streams.has(id)) continue;
      const stop = new AbortController();
      this.streams.set(id, stop);
      api
        .watch(id, (name, data) => this.heard(id, name, data), stop.signal)
        .finally(() => {
          this.streams.delete(id);
          this.refresh();
        });
    }
  }

  heard(id, name, data) {
    const video = this.all.get(id);
    if (name === "deleted") this.forget(id);
    else if (name === "status") this.put(data);
    else if (!video) return;
    else if (name === "preview") this.previews.set(id, `data:image/png;base64,${data.png}`);
    else if (name === "progress") {
      const { stage, step, of_steps, eta_seconds } = data;
      video.progress = data.progress;
      video.status = "in_progress";
      Object.assign(video.tmd, { stage, step, of_steps, eta_seconds });
    }
    if (name === "progress" || name === "preview") this.on.progress(this.all.get(id));
    else this.on.change();
  }
}
