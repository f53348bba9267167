// The form of one video: only what the chosen model has, from its card in /v1/models.

import { h, icon, iconButton, plural } from "./dom.js";

const DRAFT = "tmd-draft";

/**
 * Fills `form` for these models. `onSubmit(wishes, picture)` is called with what the server shall get; returns
 * `{ fill(video), fail(error), busy(yes), focus() }`.
 */
export function makeForm(form, models, onSubmit) {
  const draft = readDraft();
  let model = models.find((one) => one.id === draft.model) ?? models[0];
  let picture = null;
  const kept = draft.values ?? {};

  const value = (name) => form.elements[name]?.value ?? "";
  const checked = (name) => form.elements[name]?.checked ?? false;

  function build() {
    const card = model.tmd;
    const parts = [
      promptField(card),
      h("p", { class: "problem", id: "problem", role: "alert", hidden: true }),
      h("button", { class: "primary", id: "send" }, card.kind === "image" ? "Make the picture" : "Make the video"),
      examplesOf(card),
      models.length > 1 ? modelField() : null,
      card.image ? pictureField(card) : null,
      shapeFields(card),
      moreFields(card),
    ];
    form.replaceChildren(...parts.filter(Boolean));
    for (const [name, text] of Object.entries(kept)) setValue(name, text);
    lengthText();
  }

  function promptField(card) {
    if (card.label) {
      return field("label", "Class", number("label", { min: 0, max: card.num_classes - 1, value: 0 }), `0 to ${card.num_classes - 1}`);
    }
    const area = h("textarea", {
      id: "prompt", name: "prompt", rows: "3", maxlength: String(card.prompt.max_chars), autocomplete: "off",
      spellcheck: "true", placeholder: card.examples[0] ?? "What to show", "aria-describedby": "problem", enterkeyhint: "send",
    });
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    return h("div", { class: "field" }, h("label", { for: "prompt" }, "What to show"), area);
  }

  function examplesOf(card) {
    if (!card.examples.length) return null;
    const rows = card.examples.map((text) => h("li", {}, h("button", { type: "button", class: "example", onclick: () => pick(text) }, text)));
    return h("div", { class: "examples" }, h("p", { id: "examples-title" }, "What this model can draw"), h("ul", { "aria-labelledby": "examples-title" }, rows));
  }

  function pick(text) {
    setValue("prompt", text);
    form.elements.prompt.focus();
    saveDraft();
  }

  function modelField() {
    const select = h(
      "select",
      { id: "model", name: "model" },
      models.map((one) => h("option", { value: one.id, selected: one === model }, `${one.id} (${one.tmd.kind === "image" ? "stills" : "videos"})`)),
    );
    select.addEventListener("change", () => {
      saveDraft();
      model = models.find((one) => one.id === select.value);
      const prompt = kept.prompt;
      for (const name of Object.keys(kept)) delete kept[name];
      if (prompt) kept.prompt = prompt;
      picture = null;
      build();
      saveDraft();
      form.elements.model.focus();
    });
    return field("model", "Model", select);
  }

  function shapeFields(card) {
    const { frames, fps } = card;
    const rows = [
      h(
        "div",
        { class: "field" },
        h("label", { for: "width" }, "Size in pixels"),
        h(
          "div",
          { class: "pair" },
          number("width", { min: card.width.multiple, max: card.width.max, step: card.width.multiple, value: card.width.default, "aria-label": "Width in pixels" }),
          h("span", { "aria-hidden": "true" }, "×"),
          number("height", { min: card.height.multiple, max: card.height.max, step: card.height.multiple, value: card.height.default, "aria-label": "Height in pixels" }),
        ),
      ),
    ];
    if (card.kind === "video") {
      const most = frames.max - ((frames.max - frames.plus) % frames.multiple);
      rows.push(
        h(
          "div",
          { class: "field wide" },
          h("div", { class: "between" }, h("label", { for: "frames" }, "Length"), h("output", { class: "hint", id: "length", for: "frames fps" })),
          h("input", { type: "range", id: "frames", name: "frames", min: String(frames.plus), max: String(Math.max(most, frames.default)), step: String(frames.multiple), value: String(frames.default) }),
        ),
      );
      rows.splice(1, 0, field("fps", "Frames per second", number("fps", { min: 1, max: fps.max, value: fps.default })));
    }
    return h("div", { class: "field" }, h("div", { class: "row" }, rows), h("p", { class: "hint" }, summary(model)));
  }

  function pictureField(card) {
    const input = h("input", { type: "file", id: "picture", accept: "image/png,image/jpeg,image/webp,image/bmp,image/tiff", class: "sr" });
    const show = h("div", { class: "picture" });
    const draw = () => {
      show.replaceChildren(
        picture ? h("img", { src: URL.createObjectURL(picture), alt: `The picture ${picture.name}` }) : icon("picture"),
        h("span", {}, picture ? picture.name : "Start from a picture"),
        ...(picture ? [iconButton("close", "Leave the picture out", () => take(null))] : []),
      );
      strength.hidden = !picture;
    };
    const take = (file) => {
      picture = file;
      if (!file) input.value = "";
      draw();
    };
    const strength = card.strength
      ? field("strength", "How much of it changes", number("strength", { min: 0.01, max: card.strength.max, step: 0.01, value: card.strength.default }))
      : h("span");
    input.addEventListener("change", () => take(input.files[0] ?? null));
    const drop = h("label", { class: "drop", for: "picture" }, input, show);
    drop.addEventListener("dragover", (event) => event.preventDefault());
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      const file = [...event.dataTransfer.files].find((one) => one.type.startsWith("image/"));
      if (file) take(file);
    });
    draw();
    return h("div", { class: "field" }, drop, strength);
  }

  function moreFields(card) {
    const rows = [seedField(card), stepsField("steps", "Steps", card.steps)];
    if (card.inner_steps) rows.push(stepsField("inner_steps", "Inner steps", card.inner_steps));
    if (card.guidance) {
      const { min, max } = card.guidance;
      rows.push(field("guidance", "Guidance", number("guidance", { min, max, step: 0.1, value: card.guidance.default }), "1 switches it off"));
    }
    if (card.shift) rows.push(field("shift", "Shift", number("shift", { min: 1, max: 1000, step: 0.1, placeholder: "the model's" })));
    if (card.rho) rows.push(field("rho", "Fresh noise", number("rho", { min: 0, max: 10, step: 0.05, placeholder: "0" })));
    if (card.deadline) rows.push(field("deadline", "Seconds for the steps", number("deadline", { min: 0.1, max: 86400, step: 0.1, placeholder: "no limit" })));
    const wide = [];
    if (card.negative_prompt) {
      wide.push(field("negative_prompt", "What to steer away from", h("input", { type: "text", id: "negative_prompt", name: "negative_prompt", autocomplete: "off" })));
    }
    if (card.schedule) {
      wide.push(field("schedule", "Times of the steps", h("input", { type: "text", id: "schedule", name: "schedule", placeholder: "1, 0.6, 0.2, 0", inputmode: "decimal", autocomplete: "off" }), "In the place of steps, from 1 to 0"));
    }
    return h(
      "details",
      { class: "settings" },
      h("summary", {}, "Settings"),
      h("div", { class: "row" }, rows),
      wide,
      card.preview
        ? h("label", { class: "check" }, h("input", { type: "checkbox", name: "preview", id: "preview", checked: true }), "Show each step while it is made")
        : null,
    );
  }

  function seedField(card) {
    const input = number("seed", { min: card.seed.min, max: card.seed.max, placeholder: "random" });
    const roll = () => {
      input.value = String(Math.floor(Math.random() * (card.seed.max + 1)));
      saveDraft();
    };
    return h("div", { class: "field" }, h("label", { for: "seed" }, "Seed"), h("div", { class: "pair" }, input, iconButton("dice", "A random seed", roll)));
  }

  function stepsField(name, title, { allowed, max, default: usual }) {
    if (!allowed) return field(name, title, number(name, { min: 1, max, value: usual }));
    const options = allowed.map((count) => h("option", { value: String(count), selected: count === usual }, String(count)));
    return field(name, title, h("select", { id: name, name }, options));
  }

  function setValue(name, text) {
    const element = form.elements[name];
    if (!element || element.type === "file") return;
    if (element.type === "checkbox") element.checked = Boolean(text);
    else element.value = text ?? "";
  }

  function lengthText() {
    const output = form.querySelector("#length");
    if (output) output.value = `${plural(Number(value("frames")), "frame")}, ${(Number(value("frames")) / Number(value("fps") || 1)).toFixed(1)} s`;
  }

  /** What the server shall get: settings that differ from the model's own, and empty ones left out. */
  function wishes() {
    const card = model.tmd;
    const found = { model: model.id };
    if (card.label) found.label = Number(value("label"));
    else found.prompt = value("prompt").trim();
    if (value("width") && value("height")) found.size = `${value("width")}x${value("height")}`;
    if (picture && sizeIsOwn(card)) delete found.size;
    for (const name of ["frames", "fps", "steps", "inner_steps", "guidance", "shift", "rho", "deadline", "seed"]) {
      if (value(name) !== "") found[name] = Number(value(name));
    }
    if (value("negative_prompt").trim()) found.negative_prompt = value("negative_prompt").trim();
    if (picture && form.elements.strength) found.strength = Number(value("strength"));
    if (value("schedule").trim()) {
      found.schedule = value("schedule").split(/[\s,]+/).filter(Boolean).map(Number);
      delete found.steps;
    }
    if (found.guidance === card.guidance?.default) delete found.guidance;
    if (checked("preview") && !found.deadline) found.preview = true;
    return found;
  }

  const sizeIsOwn = (card) => Number(value("width")) === card.width.default && Number(value("height")) === card.height.default;

  function problem(text, name = null) {
    const line = form.querySelector("#problem");
    line.textContent = text;
    line.hidden = !text;
    for (const element of form.querySelectorAll("[aria-invalid]")) element.removeAttribute("aria-invalid");
    const names = { size: "width", input_reference: "picture", seconds: "frames" };
    const element = form.elements[names[name] ?? name];
    const found = text && element?.setAttribute ? element : null;
    // At the field, so that both are on the screen.
    (found?.closest(".row, .field") ?? form.firstElementChild).after(line);
    if (!text) return;
    if (!found) return line.scrollIntoView({ block: "nearest" });
    found.setAttribute("aria-invalid", "true");
    found.closest("details")?.setAttribute("open", "");
    found.focus();
  }

  function saveDraft() {
    for (const element of form.elements) {
      if (element.name && element.name !== "model") kept[element.name] = element.type === "checkbox" ? element.checked : element.value;
    }
    sessionStorage.setItem(DRAFT, JSON.stringify({ model: model.id, values: kept }));
  }

  form.oninput = () => {
    lengthText();
    saveDraft();
  };
  form.onsubmit = (event) => {
    event.preventDefault();
    const asked = wishes();
    if (!model.tmd.label && !asked.prompt) return problem("Describe the video in a few words.", "prompt");
    const wrong = [...form.elements].find((element) => element.validity?.badInput);
    if (wrong) return problem("This is not a number.", wrong.name);
    problem("");
    onSubmit(asked, picture);
  };

  build();
  return {
    /** Takes up the prompt and the settings of an earlier video. */
    fill(video) {
      const made = models.find((one) => one.id === video.model);
      if (made) model = made;
      for (const name of Object.keys(kept)) delete kept[name];
      const { tmd } = video;
      Object.assign(kept, { prompt: video.prompt, seed: tmd.seed, frames: tmd.frames, fps: tmd.fps, width: tmd.width, height: tmd.height });
      for (const name of ["steps", "inner_steps", "guidance", "strength", "label", "rho", "deadline"]) {
        if (tmd[name] !== null && tmd[name] !== undefined) kept[name] = tmd[name];
      }
      if (model.tmd.negative_prompt) kept.negative_prompt = tmd.negative_prompt;
      kept.preview = true;
      build();
      form.querySelector(".settings").open = true;
      saveDraft();
      this.focus();
    },
    fail: (error) => problem(error.message, error.param),
    busy(yes) {
      const button = form.querySelector("#send");
      button.disabled = yes;
      button.classList.toggle("busy", yes);
    },
    focus() {
      const first = form.elements.prompt ?? form.elements.label;
      first.focus();
      first.scrollIntoView({ block: "nearest" });
    },
  };
}

function number(name, { min, max, step = 1, value = null, placeholder = null, ...more }) {
  const text = (one) => (one === null || one === undefined ? null : String(one));
  return h("input", {
    type: "number", id: name, name, min: text(min), max: text(max), step: text(step), value: text(value), placeholder,
    inputmode: Number.isInteger(step) ? "numeric" : "decimal", ...more,
  });
}

function field(name, title, element, hint = null) {
  if (hint) element.setAttribute("aria-describedby", `${name}-hint`);
  return h("div", { class: "field" }, h("label", { for: name }, title), element, hint ? h("p", { class: "hint", id: `${name}-hint` }, hint) : null);
}

function summary({ id, tmd: { kind, width, height, frames, fps, steps } }) {
  const size = `${width.default}×${height.default}`;
  const made = kind === "image" ? `stills of ${size}` : `${plural(frames.default, "frame")} of ${size} at ${fps.default} per second`;
  return `${id} was made for ${made}, in ${plural(steps.default, "step")}.`;
}

function readDraft() {
  try {
    return JSON.parse(sessionStorage.getItem(DRAFT)) ?? {};
  } catch {
    return {};
  }
}
