// Find a species, draw it, compare, share. The address of the page holds the class and all settings.

const $ = (id) => document.getElementById(id);
const make = (tag, values, ...children) => {
  const element = Object.assign(document.createElement(tag), values);
  element.append(...children);
  return element;
};
const about = await (await fetch("about.json")).json();
const { names, tiers, limits, defaults } = about;
const everyone = names.map((_, label) => label);
const form = $("settings"), fields = form.elements;
const POSITIONS = 8, SHOWN = 50, REMEMBERED = 8;
let chosen, noise, shown, kept, running; // label; class whose noise is used; news of two pictures; AbortController

// ---- names --------------------------------------------------------------------------------------

const fold = (text) => text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase().replace(/[\s_-]+/g, " ");
const own = names.map((pair) => `\n${pair.map(fold).join("\n")}\n`);
const folded = tiers.map((tier) => tier.nodes.map(fold));
const above = everyone.map((label) => tiers.map((tier, i) => `\n${folded[i][tier.of[label]]}`).join(""));
const plain = (label) => names[label].filter(Boolean).reverse().join(", ");
const written = (label) => (names[label][1] ? [names[label][1], make("i", {}, names[label][0])] : [names[label][0]]);

// 0: a name is the query, 1: begins with it, 2: a word does, 3: has it inside, 4: a rank above has it, 5: no match
function distance(label, query) {
  const text = own[label];
  if (!text.includes(query)) return above[label].includes(query) ? 4 : 5;
  return [`\n${query}\n`, `\n${query}`, ` ${query}`].findIndex((part) => text.includes(part)) & 3;
}

const pool = () => ($("group").value ? everyone.filter((label) => tiers[0].of[label] == $("group").value) : everyone);

// ---- search -------------------------------------------------------------------------------------

let active = -1;

function search() {
  const query = fold($("search").value.trim()), found = [[], [], [], [], [], []];
  if (query || $("group").value) for (const label of pool()) found[distance(label, query)].push(label);
  const labels = found.slice(0, 5).flat();
  const options = labels.slice(0, SHOWN).map((label, i) => {
    const option = make("li", { id: `option${i}`, role: "option", onclick: () => pick(label) }, ...written(label));
    option.dataset.label = label;
    return option;
  });
  $("results").replaceChildren(...options);
  const more = labels.length > SHOWN ? `, of which the first ${SHOWN} are shown` : "";
  $("count").textContent = query || labels.length ? `${labels.length.toLocaleString("en")} found${more}` : "";
  open(options.length > 0);
  activate(-1);
}

function open(wide) {
  $("results").hidden = !wide;
  $("search").ariaExpanded = String(wide);
}

function activate(i) {
  const options = $("results").children;
  options[active]?.setAttribute("aria-selected", "false");
  active = i < options.length ? i : -1;
  options[active]?.setAttribute("aria-selected", "true");
  options[active]?.scrollIntoView({ block: "nearest" });
  $("search").setAttribute("aria-activedescendant", active < 0 ? "" : `option${active}`);
}

$("search").oninput = $("group").onchange = search;
$("search").onkeydown = (event) => {
  const options = $("results").children, step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step && $("results").hidden) open(options.length > 0);
  if (step) activate(Math.max(-1, Math.min(active + step, options.length - 1)));
  if (event.key == "Enter" && options.length) pick(+options[Math.max(active, 0)].dataset.label);
  if (event.key == "Escape") open(false);
  if (step || event.key == "Enter") event.preventDefault();
};
$("random").onclick = () => pick(pool()[Math.floor(Math.random() * pool().length)]);

function list(labels) {
  return labels.map((label) => make("li", {}, make("button", { type: "button", onclick: () => pick(label) }, ...written(label))));
}

function branch(labels, depth) {
  while (depth < tiers.length && labels.every((label) => tiers[depth].of[label] == tiers[depth].of[labels[0]])) depth++;
  if (depth >= tiers.length) return [make("ul", {}, ...list(labels))];
  const { of, nodes } = tiers[depth], groups = Map.groupBy(labels, (label) => of[label]);
  return [...groups].map(([node, inner]) => {
    const summary = make("summary", {}, nodes[node], " ", make("i", {}, inner.length.toLocaleString("en")));
    const details = make("details", { ontoggle: () => details.children.length > 1 || details.append(...branch(inner, depth + 1)) }, summary);
    return details;
  });
}

const key = `recent species of ${about.model}`;
function remember(label) {
  let labels = [];
  try {
    labels = JSON.parse(localStorage[key] ?? "[]").filter((each) => each in names && each !== label);
    if (label !== undefined) labels = [label, ...labels].slice(0, REMEMBERED);
    localStorage[key] = JSON.stringify(labels);
  } catch {} // no storage, or damaged
  $("recent").replaceChildren(...list(labels));
  $("seen").hidden = !labels.length;
}

// ---- drawing ------------------------------------------------------------------------------------

const say = (text) => ($("status").textContent = text);
const address = (path, recipe) => new URL(`${path}?${new URLSearchParams(recipe)}`, document.baseURI).href;
const image = (figure) => $(figure).querySelector("img");

// Run a task in place of the one under way, which the server stops at its next step.
async function run(task) {
  running?.abort();
  const mine = (running = new AbortController());
  const busy = (yes) => ($("cancel").hidden = $("progress").hidden = !yes);
  busy(true);
  try {
    say((await task(mine.signal)) ?? "");
  } catch (error) {
    if (running == mine) say(mine.signal.aborted ? "Cancelled." : error.message);
  }
  if (running == mine) busy(false);
}

// Have a picture drawn; return the last news of it, with its recipe and command.
async function stream(recipe, signal, what, preview = () => {}) {
  const response = await fetch(address("draw", recipe), { signal });
  if (!response.ok) throw new Error(await response.text());
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", news = {};
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (text + part.value).split("\n");
    text = lines.pop();
    for (news of lines.map(JSON.parse)) {
      if (news.error) throw new Error(news.error);
      if (news.place > 0) say(`Waiting: ${news.place} before you in the line.`);
      if (news.step) $("progress").value = news.step / news.steps;
      if (news.step % Math.ceil(news.steps / 4) == 1) say(`Drawing ${what}: step ${news.step} of ${news.steps}.`);
      if (news.preview) preview(news.preview);
    }
  }
  if (!news.recipe) throw new Error("The connection broke: draw again.");
  return news;
}

function show(figure, { recipe }) {
  const url = address("image.png", recipe), guidance = recipe.guidance == "none" ? "no" : recipe.guidance;
  Object.assign(image(figure), { src: url, alt: `${plain(recipe.class)}, drawn by the model` });
  $(figure).querySelector("a").href = url;
  $(figure).querySelector("figcaption").textContent =
    `${plain(recipe.class)}: seed ${recipe.seed}, position ${recipe.position}, ${guidance} guidance, scale ${recipe.scale}, ` +
    `${recipe.steps} steps of ${recipe.sampler}` + (about.adapters[1] ? `, ${about.adapters[recipe.adapter]}` : "");
  $(figure).hidden = false;
}

function entitle(label) {
  $("title").replaceChildren(...written(label));
  $("hint").hidden = true;
  document.title = `${plain(label)} - Species browser`;
  if (about.real) Object.assign(image("real"), { src: address("real.jpg", { class: label }), alt: `${plain(label)}, real` });
  $("real").hidden = !about.real;
  remember(label);
}

// Draw the chosen class with the settings of the form; `beside` is a recipe to draw first, for the left.
function draw(beside) {
  const recipe = { class: chosen, ...Object.fromEntries(new FormData(form)), ...(noise === undefined ? {} : { noise }) };
  const query = new URLSearchParams(beside || kept ? { ...recipe, beside: new URLSearchParams(beside ?? kept.recipe) } : recipe);
  if (location.search != `?${query}`) history.pushState(null, "", `?${query}`);
  run(async (signal) => {
    if (beside) show("kept", (kept = await stream(beside, signal, "the picture beside")));
    compare();
    const preview = (src) => ($("picture").hidden = !Object.assign(image("picture"), { src, alt: "Preview" }));
    shown = await stream(recipe, signal, "the picture", preview);
    entitle((chosen = shown.recipe.class));
    show("picture", shown);
    $("actions").hidden = false;
    $("save").href = image("picture").src;
    $("save").download = `${names[chosen][0]} ${recipe.seed} ${recipe.position}.png`;
    $("command").disabled = !shown.command;
    return "Finished.";
  });
}

function pick(label) {
  [chosen, noise] = [label, kept && kept.recipe.noise != label ? kept.recipe.noise : undefined];
  $("gallery").replaceChildren();
  open(false);
  entitle(label);
  $("title").focus();
  draw();
}

function compare() {
  $("kept").hidden = !kept;
  $("keep").textContent = kept ? "End the comparison" : "Compare";
  $("keep").ariaPressed = String(Boolean(kept));
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    say(`${what} copied.`);
  } catch {
    prompt(`${what}:`, text); // without https, other machines have no clipboard
  }
}

$("cancel").onclick = () => running.abort();
$("link").onclick = () => copy(location.href, "Link");
$("command").onclick = () => copy(shown.command, "Command");
$("keep").onclick = () => {
  [kept, noise] = kept ? [] : [shown];
  if (kept) show("kept", kept);
  say(kept ? "Now choose another species, or change settings and draw: the noise stays the same." : "");
  compare();
};
$("more").onclick = () => run(async (signal) => {
  $("gallery").replaceChildren();
  for (let position = 0; position < POSITIONS; position++) {
    const { recipe } = await stream({ ...shown.recipe, position }, signal, `${position + 1} of ${POSITIONS}`);
    const picture = make("img", { src: address("image.png", recipe), alt: `Position ${position}` });
    const onclick = () => [(fields.position.value = position), draw()];
    $("gallery").append(make("button", { type: "button", onclick }, picture));
  }
  return "Choose one of the pictures to enlarge it.";
});
$("dice").onclick = () => [(fields.seed.value = Math.floor(Math.random() * 1e6)), chosen !== undefined && draw()];
form.onsubmit = (event) => [event.preventDefault(), chosen === undefined ? $("search").focus() : draw()];
fields.guidance.onchange = () => (fields.parent_scale.parentNode.hidden = fields.guidance.value != "chain");

// ---- start --------------------------------------------------------------------------------------

function restore() {
  const { class: label, noise: other, beside, ...query } = Object.fromEntries(new URLSearchParams(location.search));
  for (const [name, value] of Object.entries({ ...defaults, ...query })) if (fields[name]) fields[name].value = value;
  fields.guidance.onchange();
  if (label !== undefined) [chosen, noise] = [label, other];
  if (label !== undefined) draw(beside && Object.fromEntries(new URLSearchParams(beside)));
}

$("model").textContent = `${names.length.toLocaleString("en")} species of ${about.model}, drawn by a diffusion model`;
for (const name of ["guidance", "sampler"]) fields[name].append(...about[name].map((each) => new Option(each)));
fields.adapter.append(...about.adapters.map((each, i) => new Option(each, i)));
fields.adapter.parentNode.hidden = about.adapters.length < 2;
for (const [name, [low, high]] of Object.entries(limits)) Object.assign(fields[name], { min: low, max: high });
if (tiers.length) $("group").append(...tiers[0].nodes.map((node, i) => new Option(node, i)));
$("in").hidden = !tiers.length;
$("tree").append(...branch(everyone, 0));
remember();
restore();
onpopstate = restore;
