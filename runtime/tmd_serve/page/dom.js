// Elements, icons and words. Nothing here knows of videos or of the server.

/** An element: `h("button", { class: "x", onclick: f }, child, "text", ...)`. Children that are null vanish. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const PATHS = {
  compare: "M3 4h6v12H3zM11 4h6v12h-6z",
  again: "M4 10a6 6 0 1 1 2 4.5M4 16v-4h4",
  download: "M10 3v9m-4-4 4 4 4-4M4 16h12",
  remove: "M4 6h12M8 6V4h4v2m2.5 0-.7 10.5H6.2L5.5 6M8.5 9v5m3-5v5",
  stop: "M6 6h8v8H6z",
  close: "m5 5 10 10M15 5 5 15",
  dice: "M4 4h12v12H4zM7.5 7.5h.01M12.5 7.5h.01M10 10h.01M7.5 12.5h.01M12.5 12.5h.01",
  picture: "M3 4h14v12H3zM3 13l4-4 4 4 2-2 4 4M13 7.5h.01",
};

/** One of the icons above, for the eye alone. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A button with an icon, whose words are for screen readers and for whoever waits over it. */
export function iconButton(name, label, onclick, more = {}) {
  return h(
    "button",
    { type: "button", class: "tool", title: label, "aria-label": label, onclick, ...more },
    icon(name),
  );
}

/** "about 4 s", "about 2 min". */
export function about(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 1) return "less than a second";
  if (seconds < 100) return `about ${Math.round(seconds)} s`;
  if (seconds < 5400) return `about ${Math.round(seconds / 60)} min`;
  return `about ${(seconds / 3600).toFixed(1)} h`;
}

/** "0.42 s", "12 s", "3 min 5 s". */
export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(2)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

/** "just now", "5 minutes ago", or a date, of seconds since 1970. */
export function ago(time) {
  const seconds = Date.now() / 1000 - time;
  const words = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
  if (seconds < 45) return "just now";
  if (seconds < 3600) return words.format(-Math.round(seconds / 60), "minute");
  if (seconds < 86400) return words.format(-Math.round(seconds / 3600), "hour");
  return new Date(time * 1000).toLocaleDateString("en", { day: "numeric", month: "short", year: "numeric" });
}

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** Tells a screen reader. */
export function announce(text) {
  const live = document.getElementById("live");
  live.textContent = "";
  requestAnimationFrame(() => (live.textContent = text));
}

/** Opens a dialog with new content; it closes by its button, by Esc, and by a click beside it. */
export function openDialog(id, ...children) {
  const dialog = document.getElementById(id);
  dialog.replaceChildren(...children);
  dialog.onclick = (event) => {
    if (event.target === dialog) dialog.close();
  };
  if (!dialog.open) dialog.showModal();
  return dialog;
}

/** The head of a dialog. */
export function dialogHead(id, title) {
  return h(
    "div",
    { class: "dialog-head" },
    h("h2", { id: `${id}-title` }, title),
    iconButton("close", "Close", () => document.getElementById(id).close()),
  );
}
