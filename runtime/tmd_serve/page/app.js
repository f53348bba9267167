// The page: a form, a queue, a gallery. Everything it knows is on the server; this puts the parts together.

import * as api from "./api.js";
import { announce, dialogHead, h, openDialog } from "./dom.js";
import { makeForm } from "./form.js";
import { Jobs } from "./jobs.js";
import { card, isCancelled, jobRow, openCompare, openViewer, updateCard, updateJob } from "./views.js";

const THEME = "tmd-theme";
const GONE = "The server does not answer.";
const at = (id) => document.getElementById(id);

let form = null;
let once = { asked: "", id: "" };
const chosen = [];

const jobs = new Jobs({ change: draw, progress: drawProgress, done: finished, online: tellOnline });

const actions = {
  open: (video) => openViewer(video, actions).catch(tellError),
  again: (video) => form?.fill(video),
  compare: choose,
  async download(video) {
    const bytes = await attempt(() => api.file(video.id));
    if (!bytes) return;
    const url = URL.createObjectURL(bytes);
    const ending = video.tmd.content_type === "image/png" ? "png" : "mp4";
    h("a", { href: url, download: `${slug(video.prompt)}-${video.tmd.seed}.${ending}` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  },
  async remove(video) {
    const cards = [...at("results").children];
    const next = cards[cards.findIndex((one) => one.dataset.id === video.id) + 1] ?? cards.at(-2);
    await attempt(() => api.remove(video.id));
    if (chosen.includes(video.id)) choose(video);
    jobs.forget(video.id);
    draw();
    announce("Deleted.");
    (next?.isConnected ? next : at("prompt"))?.focus();
  },
};

const slug = (text) =>
  text
    .toLowerCase()
    .match(/[\p{L}\p{N}]+/gu)
    ?.join("-")
    .slice(0, 60) || "video";

async function attempt(act) {
  try {
    return await act();
  } catch (error) {
    tellError(error);
    return null;
  }
}

function tellError(error) {
  if (error.status === 401) return askKey(error);
  if (error.status === 404) return jobs.refresh();
  if (form && !error.offline) form.fail(error);
  if (error.offline) jobs.setOnline(false, error);
}

// ---- what is on the screen

function draw() {
  drawList(
    at("jobs"),
    jobs.unfinished,
    (video) => jobRow(video, { onCancel: cancel }),
    (row, video) => updateJob(row, video, jobs.previews.get(video.id)),
  );
  drawList(at("results"), jobs.finished, (video) => card(video, actions), updateCard);
  at("queue").hidden = jobs.unfinished.length === 0;
  at("queue-count").textContent = jobs.unfinished.length || "";
  at("results-count").textContent = jobs.finished.length ? `${jobs.finished.length}${jobs.hasMore ? "+" : ""}` : "";
  at("empty").hidden = jobs.online === null || jobs.all.size > 0;
  at("more").hidden = !jobs.hasMore;
  drawTitle();
  drawChosen();
}

/** Leaves what is there in its place, so that focus and playing videos stay. */
function drawList(list, videos, make, update) {
  const rows = new Map([...list.children].map((row) => [row.dataset.id, row]));
  const wanted = videos.map((video) => {
    const row = rows.get(video.id) ?? make(video);
    rows.delete(video.id);
    update(row, video);
    return row;
  });
  rows.forEach((row) => row.remove());
  wanted.forEach((row, number) => {
    if (list.children[number] !== row) list.insertBefore(row, list.children[number] ?? null);
  });
}

function drawProgress(video) {
  const row = at("jobs").querySelector(`[data-id="${video.id}"]`);
  if (row) updateJob(row, video, jobs.previews.get(video.id));
  drawTitle();
}

function drawTitle() {
  const running = jobs.unfinished.find((video) => video.status === "in_progress");
  document.title = running ? `${running.progress} % · tmd` : "tmd";
}

function finished(video) {
  if (video.status === "completed") announce(`Finished: ${video.prompt}`);
  else if (isCancelled(video)) announce(`Cancelled: ${video.prompt}`);
  else announce(`Failed: ${video.error?.message}`);
}

async function cancel(video) {
  const row = at("jobs").querySelector(`[data-id="${video.id}"]`);
  row?.classList.add("stopping");
  const after = await attempt(() => api.cancel(video.id));
  if (after) jobs.put(after);
  row?.classList.remove("stopping");
  draw();
  if (!document.activeElement || document.activeElement === document.body) at("prompt")?.focus();
}

function tellOnline(yes, error) {
  at("status").dataset.state = yes ? "ready" : "gone";
  at("status-text").textContent = yes ? "Ready" : "Offline";
  if (error?.status === 401) return askKey(error);
  at("banner").hidden = yes;
  at("banner").textContent = yes
    ? ""
    : `${error?.message ?? GONE} What it has accepted is kept; this page tries again by itself.`;
  if (yes && !form) start();
}

// ---- two to compare

function choose(video) {
  const place = chosen.indexOf(video.id);
  if (place >= 0) chosen.splice(place, 1);
  else chosen.push(video.id);
  if (chosen.length > 2) chosen.shift();
  drawChosen();
}

function drawChosen() {
  for (let place = chosen.length - 1; place >= 0; place--) if (!jobs.all.has(chosen[place])) chosen.splice(place, 1);
  for (const row of at("results").children) {
    const isChosen = chosen.includes(row.dataset.id);
    row.classList.toggle("chosen", isChosen);
    row.querySelector(".pick")?.setAttribute("aria-pressed", String(isChosen));
  }
  at("bar").hidden = chosen.length === 0;
  at("bar-text").textContent = chosen.length === 2 ? "Two chosen" : "Choose another one to compare";
  at("bar-go").disabled = chosen.length !== 2;
  document.body.classList.toggle("choosing", chosen.length > 0);
}

const compare = () => attempt(() => openCompare(chosen.map((id) => jobs.all.get(id))));

// ---- sending

async function submit(wishes, picture) {
  const asked = JSON.stringify([wishes, picture?.name, picture?.size, picture?.lastModified]);
  // The same form sent again after a failure is the same job; after a success it is a new one.
  if (once.asked !== asked) once = { asked, id: crypto.randomUUID?.() ?? String(Math.random()).slice(2) };
  form.busy(true);
  try {
    jobs.put(await api.create(wishes, picture, once.id));
    once = { asked: "", id: "" };
    announce("Accepted.");
    draw();
    jobs.follow();
  } catch (error) {
    if (error.status === 401) askKey(error);
    else {
      if (error.offline) error.message = `${GONE} Nothing is lost: send it again when it is back.`;
      form.fail(error);
    }
  } finally {
    form.busy(false);
  }
}

// ---- keys, help, colours

function askKey(error) {
  if (at("key").open) return;
  const input = h("input", {
    type: "password",
    id: "key-input",
    name: "key",
    autocomplete: "off",
    required: true,
    spellcheck: "false",
  });
  const wrong = api.storedKey() ? h("p", { class: "problem", role: "alert" }, error.message) : null;
  const enter = (event) => {
    event.preventDefault();
    api.storeKey(input.value.trim());
    at("key").close();
    form = null;
    jobs.online = null;
    jobs.refresh();
  };
  openDialog(
    "key",
    dialogHead("key", "API key"),
    h(
      "form",
      { onsubmit: enter },
      h("p", {}, "This server asks for a key. It stays in this tab until you close it."),
      wrong,
      h("div", { class: "field" }, h("label", { for: "key-input" }, "Key"), input),
      h("div", { class: "send" }, h("button", { class: "primary" }, "Go on")),
    ),
  );
  input.focus();
}

const SHORTCUTS = [
  ["/", "To the prompt"],
  ["Enter", "Send the prompt; with Shift a new line"],
  ["j  k", "Next and previous result"],
  ["o", "Open it"],
  ["r", "Take it up again"],
  ["c", "Choose it to compare"],
  ["v", "Compare the two that are chosen"],
  ["s", "Save it"],
  ["Delete", "Delete it, at the second press"],
  ["x", "Cancel what is being made"],
  ["?", "This list"],
  ["Esc", "Close"],
];

function help() {
  const rows = SHORTCUTS.map(([keys, words]) =>
    h(
      "div",
      {},
      h(
        "dt",
        {},
        keys.split("  ").map((key) => h("kbd", {}, key)),
      ),
      h("dd", {}, words),
    ),
  );
  openDialog("help", dialogHead("help", "Keyboard"), h("dl", { class: "shortcuts" }, rows));
}

function step(by) {
  const cards = [...at("results").children];
  const place = cards.indexOf(document.activeElement?.closest(".card"));
  const next = cards[Math.min(Math.max(place + by, 0), cards.length - 1)];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}

function pressed(event) {
  const typing = event.target.closest("input, textarea, select");
  if (event.ctrlKey || event.metaKey || event.altKey || typing || document.querySelector("dialog[open]")) return;
  const row = document.activeElement?.closest(".card");
  const video = row && jobs.all.get(row.dataset.id);
  const done = video?.status === "completed";
  const act = {
    "/": () => form?.focus(),
    "?": help,
    j: () => step(1),
    k: () => step(-1),
    v: () => chosen.length === 2 && compare(),
    x: () => jobs.unfinished.length && cancel(jobs.unfinished[0]),
    o: () => done && actions.open(video),
    r: () => video && actions.again(video),
    c: () => done && actions.compare(video),
    s: () => done && actions.download(video),
    Delete: () => row?.querySelector(".remove").click(),
  }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  at("theme-text").textContent = `Use ${name === "dark" ? "light" : "dark"} colours`;
  at("theme").title = at("theme-text").textContent;
}

// ---- beginning

async function start() {
  try {
    form = makeForm(at("form"), await api.models(), submit);
    if (matchMedia("(pointer: fine)").matches) form.focus();
  } catch (error) {
    tellError(error);
  }
}

const system = matchMedia("(prefers-color-scheme: dark)");
const theme = () => localStorage.getItem(THEME) ?? (system.matches ? "dark" : "light");
setTheme(theme());
system.addEventListener("change", () => setTheme(theme()));
at("theme").onclick = () => {
  const name = theme() === "dark" ? "light" : "dark";
  localStorage.setItem(THEME, name);
  setTheme(name);
};
at("show-help").onclick = help;
at("more").onclick = () => attempt(() => jobs.older());
at("bar-go").onclick = compare;
at("bar-clear").onclick = () => {
  chosen.length = 0;
  drawChosen();
};
document.addEventListener("keydown", pressed);
jobs.refresh();
