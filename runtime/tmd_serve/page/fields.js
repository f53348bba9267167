// The fields of the form for one model, by what its card says. They know nothing of each other.

import { h, iconButton, plural } from "./dom.js";

/** Size, length and speed, and what the model was made for. */
export function shapeFields(model) {
  const card = model.tmd;
  const { frames, fps } = card;
  const rows = [
    h(
      "div",
      { class: "field" },
      h("label", { for: "width" }, "Size in pixels"),
      h(
        "div",
        { class: "pair" },
        number("width", {
          min: card.width.multiple,
          max: card.width.max,
          step: card.width.multiple,
          value: card.width.default,
          "aria-label": "Width in pixels",
        }),
        h("span", { "aria-hidden": "true" }, "×"),
        number("height", {
          min: card.height.multiple,
          max: card.height.max,
          step: card.height.multiple,
          value: card.height.default,
          "aria-label": "Height in pixels",
        }),
      ),
    ),
  ];
  if (card.kind === "video") {
    const most = frames.max - ((frames.max - frames.plus) % frames.multiple);
    rows.push(
      h(
        "div",
        { class: "field wide" },
        h(
          "div",
          { class: "between" },
          h("label", { for: "frames" }, "Length"),
          h("output", { class: "hint", id: "length", for: "frames fps" }),
        ),
        h("input", {
          type: "range",
          id: "frames",
          name: "frames",
          min: String(frames.plus),
          max: String(Math.max(most, frames.default)),
          step: String(frames.multiple),
          value: String(frames.default),
        }),
      ),
    );
    rows.splice(1, 0, field("fps", "Frames per second", number("fps", { min: 1, max: fps.max, value: fps.default })));
  }
  return h("div", { class: "field" }, h("div", { class: "row" }, rows), h("p", { class: "hint" }, summary(model)));
}

/** What most people leave alone. */
export function moreFields(card) {
  const rows = [seedField(card), stepsField("steps", "Steps", card.steps)];
  if (card.inner_steps) rows.push(stepsField("inner_steps", "Inner steps", card.inner_steps));
  if (card.guidance) {
    const { min, max } = card.guidance;
    rows.push(
      field(
        "guidance",
        "Guidance",
        number("guidance", { min, max, step: 0.1, value: card.guidance.default }),
        "1 switches it off",
      ),
    );
  }
  if (card.shift)
    rows.push(field("shift", "Shift", number("shift", { min: 1, max: 1000, step: 0.1, placeholder: "the model's" })));
  if (card.rho)
    rows.push(field("rho", "Fresh noise", number("rho", { min: 0, max: 10, step: 0.05, placeholder: "0" })));
  if (card.deadline)
    rows.push(
      field(
        "deadline",
        "Seconds for the steps",
        number("deadline", { min: 0.1, max: 86400, step: 0.1, placeholder: "no limit" }),
      ),
    );
  const wide = [];
  if (card.negative_prompt) {
    wide.push(
      field(
        "negative_prompt",
        "What to steer away from",
        h("input", { type: "text", id: "negative_prompt", name: "negative_prompt", autocomplete: "off" }),
      ),
    );
  }
  if (card.schedule) {
    wide.push(
      field(
        "schedule",
        "Times of the steps",
        h("input", {
          type: "text",
          id: "schedule",
          name: "schedule",
          placeholder: "1, 0.6, 0.2, 0",
          inputmode: "decimal",
          autocomplete: "off",
        }),
        "In the place of steps, from 1 to 0",
      ),
    );
  }
  return h(
    "details",
    { class: "settings" },
    h("summary", {}, "Settings"),
    h("div", { class: "row" }, rows),
    wide,
    card.preview
      ? h(
          "label",
          { class: "check" },
          h("input", { type: "checkbox", name: "preview", id: "preview", checked: true }),
          "Show each step while it is made",
        )
      : null,
  );
}

function seedField(card) {
  const input = number("seed", { min: card.seed.min, max: card.seed.max, placeholder: "random" });
  const roll = () => {
    input.value = String(Math.floor(Math.random() * (card.seed.max + 1)));
    input.dispatchEvent(new Event("input", { bubbles: true }));
  };
  return h(
    "div",
    { class: "field" },
    h("label", { for: "seed" }, "Seed"),
    h("div", { class: "pair" }, input, iconButton("dice", "A random seed", roll)),
  );
}

function stepsField(name, title, { allowed, max, default: usual }) {
  if (!allowed) return field(name, title, number(name, { min: 1, max, value: usual }));
  const options = allowed.map((count) =>
    h("option", { value: String(count), selected: count === usual }, String(count)),
  );
  return field(name, title, h("select", { id: name, name }, options));
}

function summary({ id, tmd: { kind, width, height, frames, fps, steps } }) {
  const size = `${width.default}×${height.default}`;
  const made =
    kind === "image"
      ? `stills of ${size}`
      : `${plural(frames.default, "frame")} of ${size} at ${fps.default} per second`;
  return `${id} was made for ${made}, in ${plural(steps.default, "step")}.`;
}

/** A field for a number. */
export function number(name, { min, max, step = 1, value = null, placeholder = null, ...more }) {
  const text = (one) => (one === null || one === undefined ? null : String(one));
  return h("input", {
    type: "number",
    id: name,
    name,
    min: text(min),
    max: text(max),
    step: text(step),
    value: text(value),
    placeholder,
    inputmode: Number.isInteger(step) ? "numeric" : "decimal",
    ...more,
  });
}

/** An element with its label, and words below it. */
export function field(name, title, element, hint = null) {
  if (hint) element.setAttribute("aria-describedby", `${name}-hint`);
  return h(
    "div",
    { class: "field" },
    h("label", { for: name }, title),
    element,
    hint ? h("p", { class: "hint", id: `${name}-hint` }, hint) : null,
  );
}
