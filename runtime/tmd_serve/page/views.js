// How a video looks: while it is made, in the gallery, large, and beside another one.

import * as api from "./api.js";
import { about, ago, dialogHead, duration, h, icon, iconButton, openDialog } from "./dom.js";

const SMALL = 200; // pixels; below, a frame is enlarged with its pixels as they are
const STAGES = {
  load: "Loading the model",
  text: "Reading the prompt",
  encode: "Reading the picture",
  noise: "Drawing noise",
  backbone: "Step",
  flow_head: "Step",
  decode: "Decoding",
  file: "Writing the file",
};

export const isCancelled = (video) => video.error?.code === "cancelled";
const isPicture = (video) => video.tmd.content_type === "image/png" || video.tmd.frames === 1;
const title = (video) => video.prompt || `Class ${video.tmd.label}`;
const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** A video that waits or is being made. */
export function jobRow(video, { onCancel }) {
  const row = h(
    "li",
    { class: "job", "data-id": video.id },
    h("div", { class: "preview" }, h("span", { class: "shimmer" })),
    h(
      "div",
      { class: "about" },
      h("p", { class: "title" }, title(video)),
      h("p", { class: "state" }),
      h("progress", { max: 100, value: 0, "aria-label": `Progress of ${title(video)}` }),
    ),
    h(
      "button",
      {
        type: "button",
        class: "plain small cancel",
        "aria-label": `Cancel: ${title(video)}`,
        onclick: () => onCancel(video),
      },
      "Cancel",
    ),
  );
  updateJob(row, video);
  return row;
}

/** Shows in a row where its video is now. */
export function updateJob(row, video, preview = null) {
  const bar = row.querySelector("progress");
  row.classList.toggle("waiting", video.status === "queued");
  if (video.status === "queued") {
    const { queue_position: place, estimated_seconds: seconds } = video.tmd;
    row.querySelector(".state").textContent = [
      place ? `Waiting, ${place} before it` : "Next",
      seconds ? `takes ${about(seconds)}` : "",
    ]
      .filter(Boolean)
      .join(" · ");
    bar.value = 0;
  } else {
    bar.value = video.progress;
    row.querySelector(".state").textContent = stateOf(video);
  }
  if (preview && row.querySelector("img")?.getAttribute("src") !== preview) {
    const image = h("img", { src: preview, alt: "" });
    row.querySelector(".preview").replaceChildren(image);
    image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth < SMALL));
  }
}

function stateOf({ progress, tmd }) {
  const stage = STAGES[tmd.stage] ?? "Starting";
  const inner = tmd.stage === "flow_head" ? tmd.inner_steps : 1; // which it counts one by one
  const step =
    stage === "Step" || tmd.stage === "decode"
      ? ` ${Math.ceil(tmd.step / inner)} of ${Math.round(tmd.of_steps / inner)}`
      : "";
  const left = tmd.eta_seconds ? ` · ${about(tmd.eta_seconds)} left` : "";
  return `${stage}${step} · ${progress} %${left}`;
}

/** A box in the shape of the video, within reason. */
function shaped(box, { tmd }) {
  box.style.aspectRatio = String(Math.min(Math.max(tmd.width / tmd.height, 0.75), 2));
  return box;
}

/** A card of the gallery. */
export function card(video, actions) {
  const done = video.status === "completed";
  const shape = [
    video.size.replace("x", "×"),
    isPicture(video) ? null : `${Number(video.seconds).toFixed(1)} s`,
  ].filter(Boolean);
  const media = shaped(h("div", { class: "media" }), video);
  const name = title(video);
  if (done) {
    media.append(
      thumbnail(video),
      h("button", { type: "button", class: "open", "aria-label": `Open: ${name}`, onclick: () => actions.open(video) }),
    );
  } else {
    const words = isCancelled(video) ? "Cancelled" : "Failed";
    media.append(
      h(
        "p",
        { class: "failed" },
        h("strong", {}, words),
        isCancelled(video) ? null : h("span", {}, video.error?.message),
      ),
    );
  }
  return h(
    "li",
    { class: done ? "card" : "card over", "data-id": video.id, tabindex: "-1" },
    media,
    h("p", { class: "title", title: name }, name),
    h(
      "p",
      { class: "meta" },
      shape.join(" · "),
      h("time", { datetime: new Date(1000 * video.created_at).toISOString() }, ago(video.created_at)),
    ),
    h(
      "div",
      { class: "actions" },
      cardActions(video, actions, name),
      h("span", { class: "seed" }, `seed ${video.tmd.seed}`),
    ),
  );
}

/** Keeps the words of a card true while it stays. */
export function updateCard(row, video) {
  const time = row.querySelector("time");
  const words = ago(video.created_at);
  if (time.textContent !== words) time.textContent = words;
}

function cardActions(video, actions, name) {
  const done = video.status === "completed";
  return [
    iconButton("again", `Take up again: ${name}`, () => actions.again(video)),
    done
      ? iconButton("compare", `Compare: ${name}`, () => actions.compare(video), {
          class: "tool pick",
          "aria-pressed": "false",
        })
      : null,
    done ? iconButton("download", `Download: ${name}`, () => actions.download(video)) : null,
    removeButton(video, actions, name),
  ];
}

/** Deletes at its second press, since that cannot be undone. */
function removeButton(video, actions, name) {
  const button = iconButton(
    "remove",
    `Delete: ${name}`,
    () => {
      if (button.classList.contains("sure")) return actions.remove(video);
      button.classList.add("sure");
      button.replaceChildren("Delete?");
      button.setAttribute("aria-label", `Really delete: ${name}`);
      setTimeout(() => {
        button.classList.remove("sure");
        button.replaceChildren(icon("remove"));
        button.setAttribute("aria-label", `Delete: ${name}`);
      }, 4000);
    },
    { class: "tool remove" },
  );
  return button;
}

/** The middle frame; a video plays over it while somebody points at it. */
function thumbnail(video) {
  const image = h("img", { alt: "", loading: "lazy", decoding: "async" });
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth < SMALL));
  api.fileUrl(video.id, "thumbnail").then(
    (url) => (image.src = url),
    () => {},
  );
  if (isPicture(video)) return image;
  const box = h("div", { class: "frame" }, image);
  let player = null;
  const play = async () => {
    if (player || still()) return;
    player = mediaOf(video, await api.fileUrl(video.id, "video").catch(() => null), { muted: true, loop: true });
    box.append(player);
    player.play().catch(() => {});
  };
  const stop = () => {
    player?.remove();
    player = null;
  };
  queueMicrotask(() => {
    const around = box.closest(".card");
    around?.addEventListener("pointerenter", play);
    around?.addEventListener("focusin", play);
    around?.addEventListener("pointerleave", stop);
    around?.addEventListener("focusout", (event) => around.contains(event.relatedTarget) || stop());
  });
  return box;
}

function mediaOf(video, url, more = {}) {
  if (isPicture(video)) {
    const image = h("img", { src: url, alt: title(video) });
    image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth < SMALL));
    return image;
  }
  const player = h("video", { src: url, playsinline: true, preload: "auto", "aria-label": title(video), ...more });
  player.muted = more.muted ?? false;
  player.addEventListener("loadedmetadata", () => player.classList.toggle("pixels", player.videoWidth < SMALL));
  return player;
}

const ROWS = [
  ["Model", (video) => video.model],
  ["Seed", (video) => video.tmd.seed],
  ["Size", (video) => video.size.replace("x", "×")],
  ["Frames", (video) => video.tmd.frames],
  ["Frames per second", (video) => (video.tmd.frames > 1 ? video.tmd.fps : null)],
  ["Steps", (video) => video.tmd.steps],
  ["Inner steps", (video) => (video.tmd.inner_steps > 1 ? video.tmd.inner_steps : null)],
  ["Guidance", (video) => (video.tmd.guidance === 1 ? null : video.tmd.guidance)],
  ["Steered away from", (video) => (video.tmd.guidance === 1 ? null : video.tmd.negative_prompt || null)],
  ["Strength", (video) => video.tmd.strength],
  ["Fresh noise", (video) => video.tmd.rho || null],
  ["Time", (video) => (video.tmd.total_seconds ? duration(video.tmd.total_seconds) : null)],
];

function settingsOf(video, other = null) {
  const rows = ROWS.map(([name, of]) => [name, of(video), other && of(other)]).filter(
    ([, value, theirs]) => (value ?? theirs ?? null) !== null,
  );
  return h(
    "dl",
    { class: "facts" },
    rows.map(([name, value, theirs]) =>
      h(
        "div",
        { class: other && String(value) !== String(theirs) ? "differs" : null },
        h("dt", {}, name),
        h("dd", {}, String(value ?? "none")),
      ),
    ),
  );
}

/** One video, large, with everything that made it. */
export async function openViewer(video, actions) {
  const media = shaped(h("div", { class: "stage" }), video);
  const close = (act) => () => {
    document.getElementById("viewer").close();
    act(video);
  };
  openDialog(
    "viewer",
    dialogHead("viewer", title(video)),
    h(
      "div",
      { class: "viewer" },
      media,
      h(
        "div",
        { class: "side" },
        settingsOf(video),
        video.tmd.warnings?.length
          ? h(
              "ul",
              { class: "notes" },
              video.tmd.warnings.map((text) => h("li", {}, text)),
            )
          : null,
        h(
          "div",
          { class: "send" },
          h("button", { type: "button", class: "primary", onclick: close(actions.again) }, "Take up again"),
          h("button", { type: "button", class: "plain", onclick: () => actions.download(video) }, "Download"),
        ),
      ),
    ),
  );
  const player = mediaOf(video, await api.fileUrl(video.id, "video"), { controls: true, loop: true, muted: true });
  media.append(player);
  if (player.play && !still()) player.play().catch(() => {});
  document.getElementById("viewer").addEventListener("close", () => player.pause?.(), { once: true });
}

/** Two videos side by side, played together, with the settings in which they differ. */
export async function openCompare(videos) {
  const urls = await Promise.all(videos.map((video) => api.fileUrl(video.id, "video")));
  const media = videos.map((video, number) => mediaOf(video, urls[number], { loop: true, muted: true }));
  const players = media.filter((element) => element.tagName === "VIDEO");
  const sides = videos.map((video, number) =>
    h(
      "figure",
      {},
      shaped(h("div", { class: "stage" }, media[number]), video),
      h("figcaption", {}, title(video)),
      settingsOf(video, videos[1 - number]),
    ),
  );
  const dialog = openDialog(
    "compare",
    dialogHead("compare", "Side by side"),
    h("div", { class: "sides" }, sides),
    players.length ? controls(players) : null,
  );
  dialog.addEventListener("close", () => players.forEach((player) => player.pause()), { once: true });
  await Promise.all(players.map(ready));
  if (!still()) players.forEach((player) => player.play().catch(() => {}));
}

const ready = (player) =>
  player.readyState >= 1
    ? null
    : new Promise((resolve) => {
        player.addEventListener("loadedmetadata", resolve, { once: true });
        player.addEventListener("error", resolve, { once: true });
      });

/** One button and one slider for both players; the first one leads. */
function controls(players) {
  const [leader] = players;
  const button = h(
    "button",
    { type: "button", class: "plain", onclick: () => (leader.paused ? both("play") : both("pause")) },
    "Play",
  );
  const slider = h("input", { type: "range", min: "0", max: "1000", value: "0", "aria-label": "Position in both" });
  const both = (what) => players.forEach((player) => player[what]()?.catch?.(() => {}));
  slider.addEventListener("input", () => {
    both("pause");
    for (const player of players) player.currentTime = (slider.value / 1000) * (player.duration || 0);
  });
  leader.addEventListener("play", () => (button.textContent = "Pause"));
  leader.addEventListener("pause", () => (button.textContent = "Play"));
  leader.addEventListener("timeupdate", () => {
    if (!leader.paused) slider.value = String((1000 * leader.currentTime) / (leader.duration || 1));
  });
  return h("div", { class: "controls" }, button, slider);
}
