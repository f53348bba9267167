// The form of one video: only what the chosen model has, from its card in /v1/models.

import { h, icon, iconButton, plural } from "./dom.js";
import { field, moreFields, number, shapeFields } from "./fields.js";

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
      shapeFields(model),
      moreFields(card),
    ];
    form.replaceChildren(...parts.filter(Boolean));
    for (const [name, text] of Object.entries(kept)) setValue(name, text);
    lengthText();
  }

  function promptField(card) {
    if (card.label) {
      return field(
        "label",
        "Class",
        number("label", { min: 0, max: card.num_classes - 1, value: 0 }),
        `0 to ${card.num_classes - 1}`,
      );
    }
    const area = h("textarea", {
      id: "prompt",
      name: "prompt",
      rows: "3",
      maxlength: String(card.prompt.max_chars),
      autocomplete: "off",
      spellcheck: "true",
      placeholder: card.examples[0] ?? "What to show",
      "aria-describedby": "problem",
      enterkeyhint: "send",
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
    const rows = card.examples.map((text) =>
      h("li", {}, h("button", { type: "button", class: "example", onclick: () => pick(text) }, text)),
    );
    return h(
      "div",
      { class: "examples" },
      h("p", { id: "examples-title" }, "What this model can draw"),
      h("ul", { "aria-labelledby": "examples-title" }, rows),
    );
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
      models.map((one) =>
        h(
          "option",
          { value: one.id, selected: one === model },
          `${one.id} (${one.tmd.kind === "image" ? "stills" : "videos"})`,
        ),
      ),
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

  function pictureField(card) {
    const input = h("input", {
      type: "file",
      id: "picture",
      accept: "image/png,image/jpeg,image/webp,image/bmp,image/tiff",
      class: "sr",
    });
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
      ? field(
          "strength",
          "How much of it changes",
          number("strength", { min: 0.01, max: card.strength.max, step: 0.01, value: card.strength.default }),
        )
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

  function setValue(name, text) {
    const element = form.elements[name];
    if (!element || element.type === "file") return;
    if (element.type === "checkbox") element.checked = Boolean(text);
    else element.value = text ?? "";
  }

  function lengthText() {
    const output = form.querySelector("#length");
    if (output) output.value = lengthOf(Number(value("frames")), Number(value("fps") || 1));
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
      found.schedule = value("schedule")
        .split(/[\s,]+/)
        .filter(Boolean)
        .map(Number);
      delete found.steps;
    }
    if (found.guidance === card.guidance?.default) delete found.guidance;
    if (checked("preview") && !found.deadline) found.preview = true;
    return found;
  }

  const sizeIsOwn = (card) =>
    Number(value("width")) === card.width.default && Number(value("height")) === card.height.default;

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
      if (element.name && element.name !== "model")
        kept[element.name] = element.type === "checkbox" ? element.checked : element.value;
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
      Object.assign(kept, {
        prompt: video.prompt,
        seed: tmd.seed,
        frames: tmd.frames,
        fps: tmd.fps,
        width: tmd.width,
        height: tmd.height,
      });
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

function readDraft() {
  try {
    return JSON.parse(sessionStorage.getItem(DRAFT)) ?? {};
  } catch {
    return {};
  }
}

const lengthOf = (frames, fps) => `${plural(frames, "frame")}, ${(frames / fps).toFixed(1)} s`;
