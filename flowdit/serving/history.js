// Earlier images, in the storage of the browser: small pictures and their recipes, which draw the same image again.
const KEY = "flowdit-history";
const MOST = 60;
const MOST_CHARACTERS = 60000; // of a picture; a larger one is made smaller

function stored() {
  try {
    const entries = JSON.parse(localStorage.getItem(KEY) || "[]");
    return entries.filter((entry) => typeof entry.recipe === "string" && /^data:image\//.test(entry.picture));
  } catch {
    return [];
  }
}

function store(entries) {
  for (let kept = entries.slice(0, MOST); ; kept = kept.slice(0, Math.floor(kept.length / 2))) {
    try {
      return localStorage.setItem(KEY, JSON.stringify(kept));
    } catch {
      if (kept.length === 0) return; // no storage at all
    }
  }
}

async function smaller(picture) {
  if (picture.length <= MOST_CHARACTERS) return picture;
  const image = new Image();
  image.src = picture;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = 128;
  canvas.height = Math.round((128 * image.height) / image.width);
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.85);
}

function show() {
  const entries = stored();
  element.querySelector(".fd-history").hidden = entries.length === 0;
  element.querySelector(".fd-thumbs").replaceChildren(
    ...entries.map((entry) => {
      const button = document.createElement("button");
      const image = document.createElement("img");
      button.type = "button";
      button.title = `${entry.caption || "image"}: draw again`;
      image.src = entry.picture;
      image.alt = entry.caption || "image";
      button.append(image);
      button.onclick = () => trigger("redraw", { recipe: entry.recipe });
      return button;
    }),
  );
}

async function add(event) {
  const pictures = event.detail.groups.flatMap((group) => group.pictures);
  const added = await Promise.all(
    pictures.map(async ({ png, caption, recipe }) => ({ picture: await smaller(png), caption, recipe })),
  );
  const recipes = new Set(added.map((entry) => entry.recipe));
  store([...added, ...stored().filter((entry) => !recipes.has(entry.recipe))]);
  show();
}

window.addEventListener("flowdit-drawn", add);
element.querySelector("header button").onclick = () => (store([]), show());
show();
