// The pictures of a draw, with one slider that moves all of them along the path from noise to image.
const find = (name) => element.querySelector(name);
const make = (tag, className, text) => {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
let playing = null;

function showFrame() {
  const slider = find(".fd-path input");
  const [frame, last] = [Number(slider.value), Number(slider.max)];
  slider.style.setProperty("--fd-filled", `${(100 * frame) / Math.max(last, 1)}%`);
  for (const strip of element.querySelectorAll(".fd-strip")) {
    strip.style.backgroundPositionX = `${(100 * frame) / Math.max(last, 1)}%`;
    strip.style.visibility = frame === last ? "hidden" : "visible";
  }
}

function stop() {
  clearInterval(playing);
  playing = null;
}

function play() {
  const slider = find(".fd-path input");
  stop();
  slider.value = 0;
  showFrame();
  playing = setInterval(() => {
    slider.value = Number(slider.value) + 1;
    showFrame();
    if (slider.value === slider.max) stop();
  }, 140);
}

function card(picture, frames) {
  const recipe = JSON.parse(picture.recipe);
  const figure = make("figure", "fd-card");
  const view = make("div", "fd-view");
  const image = make("img", "fd-image");
  image.src = picture.png;
  image.alt = picture.caption || "image";
  view.append(image);
  if (picture.frames) {
    const strip = make("div", "fd-strip");
    strip.style.backgroundImage = `url("${picture.frames}")`;
    strip.style.backgroundSize = `${100 * frames}% 100%`;
    view.append(strip);
  }
  const name = (picture.caption || "image").replace(/[^\p{L}\p{N}_-]+/gu, "_").slice(0, 60);
  const file = `${name}_seed${recipe.seed}_${recipe.number}`;
  const line = make("figcaption", "");
  line.append(make("span", "fd-caption", picture.caption || "image"));
  line.append(make("span", "fd-detail", `seed ${recipe.seed}, no. ${recipe.number}`));
  const save = make("span", "fd-save");
  const json = URL.createObjectURL(new Blob([picture.recipe], { type: "application/json" }));
  for (const [text, url, end] of [["PNG", picture.png, "png"], ["Recipe", json, "json"]]) {
    const link = make("a", "", text);
    [link.href, link.download] = [url, `${file}.${end}`];
    save.append(link);
  }
  line.append(save);
  figure.append(view, line);
  return figure;
}

function show() {
  const value = props.value;
  if (!value || !value.groups) return;
  stop();
  for (const link of element.querySelectorAll('a[href^="blob:"]')) URL.revokeObjectURL(link.href);
  find(".fd-empty").hidden = true;
  const groups = find(".fd-groups");
  groups.replaceChildren();
  for (const group of value.groups) {
    const section = make("section", "fd-group");
    if (value.groups.length > 1) section.append(make("h2", "", group.model));
    const grid = make("div", "fd-grid");
    grid.dataset.count = Math.min(group.pictures.length, 4);
    grid.append(...group.pictures.map((picture) => card(picture, value.frames)));
    section.append(grid);
    groups.append(section);
  }
  const path = find(".fd-path");
  path.hidden = !value.frames;
  const slider = find(".fd-path input");
  slider.max = Math.max(value.frames - 1, 0);
  slider.value = slider.max;
  slider.oninput = () => (stop(), showFrame());
  find(".fd-play").onclick = play;
  showFrame();
  window.dispatchEvent(new CustomEvent("flowdit-drawn", { detail: value }));
}

watch("value", show);
