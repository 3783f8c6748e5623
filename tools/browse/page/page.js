// Find a species, draw it, compare, share. The address of the page holds the class and all settings.

const $ = (id) => document.getElementById(id);
const make = (tag, values, ...children) => {
  const element = Object.assign(document.createElement(tag), values);
  element.append(...children);
  return element;
};
const about = await (await fetch("about.json")).json(), { names, tiers } = about;
const form = $("settings"), fields = form.elements, everyone = [...names.keys()];
const OPTIONS = 30, REMEMBERED = 8, POSITIONS = 8;
let chosen, noise, shown, kept, running; // class; class whose noise is used; news of two pictures; AbortController

// ---- names --------------------------------------------------------------------------------------

const fold = (text) => text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase().replace(/[\s_-]+/g, " ");
const own = names.map((pair) => `\n${pair.map(fold).join("\n")}\n`);
const nodes = tiers.map((tier) => tier.nodes.map(fold));
const above = everyone.map((label) => tiers.map((tier, i) => nodes[i][tier.of[label]]).join("\n"));
const plain = (label) => names[label].filter(Boolean).reverse().join(", ");
const styled = (label) => (names[label][1] ? [names[label][1], " ", make("i", {}, names[label][0])] : [names[label][0]]);
const list = (labels) => labels.map((label) =>
  make("li", {}, make("button", { type: "button", onclick: () => pick(label) }, ...styled(label))));

// 0: a name is the query, 1: begins with it, 2: a word does, 3: it is inside, 4: it is inside a rank above, 5: no match
function distance(label, query) {
  const text = own[label];
  if (!text.includes(query)) return above[label].includes(query) ? 4 : 5;
  return [`\n${query}\n`, `\n${query}`, ` ${query}`, query].findIndex((part) => text.includes(part));
}

// The tree of labels, from a tier on; the part below a node is made when the node is opened.
function branch(labels, depth) {
  const tier = tiers[depth], groups = tier && Map.groupBy(labels, (label) => tier.of[label]);
  if (!tier) return [make("ul", {}, ...list(labels))];
  if (groups.size == 1) return branch(labels, depth + 1);
  return [...groups].map(([node, inner]) => {
    const summary = make("summary", {}, tier.nodes[node], " ", make("i", {}, inner.length.toLocaleString("en")));
    const ontoggle = ({ target }) => target.children.length > 1 || target.append(...branch(inner, depth + 1));
    return make("details", { ontoggle }, summary);
  });
}

function remember(label) {
  const key = `recent species of ${about.model}`;
  let labels = [];
  try {
    labels = JSON.parse(localStorage[key] ?? "[]").filter((each) => each in names && each != label);
    if (label !== undefined) localStorage[key] = JSON.stringify((labels = [label, ...labels].slice(0, REMEMBERED)));
  } catch {} // the browser stores nothing
  $("recent").replaceChildren(...list(labels));
  $("seen").hidden = !labels.length;
}

// ---- search -------------------------------------------------------------------------------------

const input = $("search"), options = $("results").children;
const pool = () => ($("group").value ? everyone.filter((label) => tiers[0].of[label] == $("group").value) : everyone);
let active = -1;

function expand(yes) {
  $("results").hidden = !yes;
  input.setAttribute("aria-expanded", yes);
}
function activate(i) {
  options[active]?.removeAttribute("aria-selected");
  active = Math.max(-1, Math.min(i, options.length - 1));
  options[active]?.setAttribute("aria-selected", true);
  options[active]?.scrollIntoView({ block: "nearest" });
  input.setAttribute("aria-activedescendant", options[active]?.id ?? "");
}
input.oninput = $("group").onchange = () => {
  const query = fold(input.value.trim()), found = [[], [], [], [], [], []];
  if (query || $("group").value) for (const label of pool()) found[distance(label, query)].push(label);
  const labels = found.slice(0, 5).flat(), first = labels.length > OPTIONS ? `, the first ${OPTIONS} are shown` : "";
  $("results").replaceChildren(...labels.slice(0, OPTIONS).map((label, i) =>
    make("li", { id: `option${i}`, role: "option", onclick: () => pick(label) }, ...styled(label))));
  $("count").textContent = query || labels.length ? `${labels.length.toLocaleString("en")} found${first}` : "";
  expand(labels.length > 0);
  activate(-1);
};
input.onkeydown = (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) [expand(options.length > 0), activate(active + step)];
  else if (event.key == "Enter") options[Math.max(active, 0)]?.onclick();
  else if (event.key == "Escape") expand(false);
  if (step || event.key == "Enter") event.preventDefault();
};
$("random").onclick = () => pick(pool()[Math.floor(Math.random() * pool().length)]);

// ---- drawing ------------------------------------------------------------------------------------

const say = (text) => ($("status").textContent = text);
const address = (path, recipe) => new URL(`${path}?${new URLSearchParams(recipe)}`, document.baseURI).href;
const part = (figure, tag) => $(figure).querySelector(tag);

// Run a task in place of the one under way, whose drawing the server stops at its next step.
async function run(task) {
  running?.abort();
  const mine = (running = new AbortController());
  $("cancel").hidden = $("progress").hidden = false;
  say("Drawing ...");
  try {
    say(await task(mine.signal));
  } catch (error) {
    if (running != mine) return;
    say(mine.signal.aborted ? "Cancelled." : error.message);
    if (shown) present();
  }
  if (running == mine) $("cancel").hidden = $("progress").hidden = true;
}

// Have a picture drawn; return the last news of it, with its recipe and command.
async function stream(recipe, signal, what, preview = () => {}) {
  const response = await fetch(address("draw", recipe), { signal });
  if (!response.ok) throw new Error(await response.text());
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", news = {};
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    const lines = (text + read.value).split("\n");
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
  const src = address("image.png", recipe), settings = { ...recipe, adapter: about.adapters[recipe.adapter] };
  const told = ["seed", "position", "scale", "steps", "sampler", "guidance", ...(about.adapters[1] ? ["adapter"] : [])];
  Object.assign(part(figure, "img"), { src, alt: `${plain(recipe.class)}, drawn by the model` });
  part(figure, "a").href = src;
  part(figure, "figcaption").textContent =
    `${plain(recipe.class)}: ${told.map((name) => `${name} ${settings[name]}`).join(", ")}`;
  $(figure).hidden = false;
}
function entitle(label) {
  $("title").replaceChildren(...styled(label));
  document.title = `${plain(label)} - Species browser`;
  $("hint").hidden = true;
  if (about.real) Object.assign(part("real", "img"), { src: address("real.jpg", { class: label }), alt: `${plain(label)}, real` });
  $("real").hidden = !about.real;
  remember(label);
}
function present() {
  const { recipe, command } = shown;
  entitle((chosen = recipe.class));
  show("picture", shown);
  $("save").href = part("picture", "img").src;
  $("save").download = `${names[chosen][0]} ${recipe.seed}-${recipe.position}.png`;
  $("command").disabled = !command;
  $("actions").hidden = false;
}
function compare() {
  $("kept").hidden = !kept;
  if (kept) show("kept", kept);
  $("keep").textContent = kept ? "End the comparison" : "Compare";
}

// Draw the chosen class with the settings of the form; before it `beside`, a recipe, if there is one.
function draw(beside) {
  const recipe = { class: chosen, ...(noise === undefined ? {} : { noise }), ...Object.fromEntries(new FormData(form)) };
  const left = beside ?? kept?.recipe, more = left && { beside: new URLSearchParams(left) };
  const query = new URLSearchParams({ ...recipe, ...more });
  if (location.search != `?${query}`) history.pushState(null, "", `?${query}`);
  run(async (signal) => {
    if (beside) kept = await stream(beside, signal, "the picture beside");
    compare();
    shown = await stream(recipe, signal, "the picture", (src) => {
      Object.assign(part("picture", "img"), { src, alt: "Preview" });
      $("picture").hidden = false;
    });
    present();
    return "Finished.";
  });
}
function pick(label) {
  [chosen, noise] = [label, kept && kept.recipe.noise != label ? kept.recipe.noise : undefined];
  $("gallery").replaceChildren();
  expand(false);
  entitle(label);
  $("title").focus();
  draw();
}
async function copy(text, what) {
  const written = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  written ? say(`${what} copied.`) : prompt(what, text); // without https, other machines have no clipboard
}

$("cancel").onclick = () => running.abort();
$("link").onclick = () => copy(location.href, "Link");
$("command").onclick = () => copy(shown.command, "Command");
$("keep").onclick = () => {
  [kept, noise] = kept ? [] : [shown, noise];
  compare();
  say(kept ? "Now choose another species, or change settings and draw: the noise stays the same." : "");
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
$("dice").onclick = () => [(fields.seed.value = Math.floor(Math.random() * 1e6)), chosen === undefined || draw()];
form.onsubmit = (event) => [event.preventDefault(), chosen === undefined ? input.focus() : draw()];
fields.guidance.onchange = () => (fields.parent_scale.parentNode.hidden = fields.guidance.value != "chain");

// ---- start --------------------------------------------------------------------------------------

onpopstate = () => {
  const query = Object.fromEntries(new URLSearchParams(location.search));
  for (const [name, value] of Object.entries({ ...about.defaults, ...query })) if (fields[name]) fields[name].value = value;
  fields.guidance.onchange();
  [chosen, noise, kept] = [query.class, query.noise];
  if (chosen !== undefined) draw(query.beside && Object.fromEntries(new URLSearchParams(query.beside)));
};
for (const name of ["guidance", "guide", "sampler"]) fields[name].append(...about[name].map((each) => new Option(each)));
fields.adapter.append(...about.adapters.map((each, i) => new Option(each, i)));
for (const name of ["adapter", "guide"]) fields[name].parentNode.hidden = fields[name].length < 2;
for (const [name, [low, high]] of Object.entries(about.limits)) Object.assign(fields[name], { min: low, max: high });
$("group").append(...(tiers[0]?.nodes ?? []).map((node, i) => new Option(node, i)));
$("in").hidden = !tiers.length;
$("tree").append(...branch(everyone, 0));
$("model").textContent = `${names.length.toLocaleString("en")} species, ${about.model}`;
remember();
onpopstate();
input.oninput(); // text that was typed before the names arrived
