// The server's HTTP interface: requests, its errors in its own words, files, and the events of one video.

const KEY = "tmd-key";

/** What the server refuses, or that it does not answer (`offline`). `param` names the field at fault. */
export class ServerError extends Error {
  constructor(message, { status = 0, param = null, code = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code, offline: status === 0 });
  }
}

export const storedKey = () => sessionStorage.getItem(KEY);
export const storeKey = (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY));

async function send(path, options = {}) {
  const headers = new Headers(options.headers);
  if (storedKey()) headers.set("Authorization", `Bearer ${storedKey()}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer.");
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  const { message, param, code } = body?.error ?? {};
  throw new ServerError(sentence(message ?? `The server answered ${answer.status}.`), {
    status: answer.status,
    param,
    code,
  });
}

/** The server's messages go on behind a name, so they begin small. */
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

const json = async (path, options) => (await send(path, options)).json();

export const models = async () => (await json("v1/models")).data;
export const video = (id) => json(`v1/videos/${id}`);
export const videos = (after = null, limit = 24) =>
  json(`v1/videos?limit=${limit}${after ? `&after=${encodeURIComponent(after)}` : ""}`);
export const cancel = (id) => json(`v1/videos/${id}/cancel`, { method: "POST" });
export const remove = (id) => json(`v1/videos/${id}`, { method: "DELETE" });

/** Asks for a video. The same `once` never makes a second one, so asking again after a failure is safe. */
export function create(wishes, picture, once) {
  const headers = { "Idempotency-Key": once };
  if (!picture) {
    headers["Content-Type"] = "application/json";
    return json("v1/videos", { method: "POST", headers, body: JSON.stringify(wishes) });
  }
  const body = new FormData();
  for (const [name, value] of Object.entries(wishes)) body.set(name, String(value));
  body.set("input_reference", picture);
  return json("v1/videos", { method: "POST", headers, body });
}

const files = new Map();

/** An address for a file of a video. With a key its bytes are fetched, since an element cannot send one. */
export async function fileUrl(id, variant) {
  const path = `v1/videos/${id}/content?variant=${variant}`;
  if (!storedKey()) return path;
  if (!files.has(path)) {
    const loading = send(path).then(async (answer) => URL.createObjectURL(await answer.blob()));
    files.set(path, loading);
    loading.catch(() => files.delete(path));
  }
  return files.get(path);
}

/** The bytes of a video, for a download under a name of our own: a header of the server goes before a link's. */
export const file = async (id) => (await send(`v1/videos/${id}/content`)).blob();

/** Gives back the memory of a video's files. */
export function forgetFiles(id) {
  for (const [path, url] of files) {
    if (path.includes(`/${id}/`)) {
      files.delete(path);
      url.then(URL.revokeObjectURL, () => {});
    }
  }
}

/** Calls `on(name, data)` for each event of a video until its last one; comes back by itself after a break. */
export async function watch(id, on, signal) {
  let last = null;
  let pause = 500;
  while (!signal.aborted) {
    try {
      const headers = last === null ? {} : { "Last-Event-ID": last };
      const answer = await send(`v1/videos/${id}/events`, { headers, signal });
      for await (const event of eventsOf(answer.body)) {
        pause = 500;
        last = event.id ?? last;
        on(event.name, event.data);
        if (event.name === "deleted" || (event.name === "status" && isOver(event.data))) return;
      }
    } catch (error) {
      if (error.name === "AbortError" || error.status === 404 || error.status === 401) return;
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
    pause = Math.min(2 * pause, 8000);
  }
}

export const isOver = (video) => video.status === "completed" || video.status === "failed";

async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const fields = {};
      for (const line of part.split("\n")) {
        const [, name, text] = line.match(/^(\w+): ?(.*)$/) ?? [];
        if (name) fields[name] = text;
      }
      if (fields.data) yield { id: fields.id, name: fields.event ?? "message", data: JSON.parse(fields.data) };
    }
  }
}
