// The page: who labels, which item is on the screen, what a key does. Data only ever becomes text nodes.
import { element, keyCap, media } from "./cards.js";
import { makeTask } from "./tasks.js";
import { showAgreement } from "./agreement.js";

const $ = (id) => document.getElementById(id);
const CALM = 250; // milliseconds after a new item in which a key is the second press of a double one
const FLASH = 140; // milliseconds that a choice is shown before the next item
const state = { job: null, name: null, item: null, task: null, seen: 0, busy: false, ready: false };

async function call(path, body) {
  const options = body && {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Nothing was saved; try again.");
  }
  if (answer.ok) return answer.json();
  const problem = new Error((await answer.text()).trim() || `error ${answer.status}`);
  problem.status = answer.status;
  throw problem;
}

let fading;
function note(text) {
  clearTimeout(fading);
  $("note").textContent = text;
  if (text) fading = setTimeout(() => note(""), 6000);
}

function view(name) {
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== name;
  $("undo").hidden = !["work", "finished"].includes(name);
  $("progress").hidden = !["work", "finished"].includes(name);
  $("who").hidden = state.name === null;
  const away = name === "agreement";
  $("to-agreement").textContent = away ? "Back to labelling" : "Agreement";
  $("to-agreement").href = away ? "#" : "#agreement";
}

// --- who ------------------------------------------------------------------------------------------------------

function remembered() {
  const name = sessionStorage.getItem("annotator");
  return state.job.fixed && !state.job.names.includes(name) ? null : name;
}

async function start() {
  state.job = await call("/api/job");
  const { names, fixed, longest_name: longest } = state.job;
  state.name = remembered() ?? (fixed && names.length === 1 ? names[0] : null);
  $("name").maxLength = longest;
  $("name-form").hidden = fixed;
  $("names").replaceChildren(
    ...names.map((name) => {
      const button = element("button", "", name);
      button.type = "button";
      button.addEventListener("click", () => enter(name));
      return button;
    }),
  );
  $("key-list").replaceChildren(...keys(state.job.task).flatMap(([caps, what]) => [
    element("dt", "", ...caps.flatMap((cap) => [keyCap(cap), " "])), element("dd", "", what),
  ]));
  await route();
}

function enter(name) {
  state.name = name.trim();
  if (!state.name) return;
  sessionStorage.setItem("annotator", state.name);
  state.item = null;
  route();
}

function leave() {
  sessionStorage.removeItem("annotator");
  state.name = state.item = null;
  state.task?.stop();
  call("/api/job").then((job) => { state.job = job; return start(); }).catch((problem) => note(problem.message));
}

async function route() {
  note("");
  $("who").textContent = state.name ?? "";
  try {
    if (location.hash === "#agreement") {
      state.task?.stop();
      view("agreement");
      showAgreement($("agreement"), await call("/api/agreement"), state.job.task);
    } else if (state.name === null) {
      view("start");
      (state.job.fixed ? $("names").firstChild : $("name"))?.focus();
    } else {
      show(await call("/api/next", { annotator: state.name }));
    }
  } catch (problem) {
    note(problem.message);
    if (problem.status === 400 || problem.status === 403) {
      state.name = null;
      view("start");
    }
  }
}

// --- items ----------------------------------------------------------------------------------------------------

function show(next) {
  state.task?.stop();
  state.item = next.item;
  $("meter").max = Math.max(next.total, 1);
  $("meter").value = next.done;
  $("count").textContent = `${next.done} of ${next.total}`;
  $("undo").disabled = next.done === 0;
  if (!next.item) {
    state.task = null;
    $("thanks").textContent = next.total
      ? `${state.name}, you have answered all ${next.total}.`
      : "Others have taken every item; there is nothing left to answer.";
    view("finished");
    return;
  }
  view("work");
  state.task = makeTask(state.job.task, next.item, submit);
  $("ask").replaceChildren(ask(next.item));
  $("stage").replaceChildren(state.task.node);
  $("actions").replaceChildren(...state.task.actions, element("span", "gap"), skipButton());
  scrollTo(0, 0);
  const item = state.item;
  state.ready = false;
  state.task.loaded.then((whole) => {
    if (state.item !== item) return;
    state.seen = performance.now();
    state.ready = whole;
    if (!whole) note("A file could not be loaded. Reload the page, or skip this item.");
  });
  for (const url of next.upcoming) new Image().src = url;
}

function ask(item) {
  const words = element("div", "", element("p", "question", state.task.question));
  if (typeof item.prompt === "string") {
    words.append(element("p", item.prompt.length > 240 ? "prompt long" : "prompt", item.prompt));
  } else {
    words.append(element("div", "prompt chat", ...item.prompt.map(turn)));
  }
  const box = element("div", "ask", words);
  if (item.condition) {
    const picture = media(item.condition_kind, item.condition).node;
    box.append(element("figure", "given", picture, element("figcaption", "", "condition")));
  }
  return box;
}

const turn = ({ role, content }) => element("div", role === "user" ? "turn user" : "turn", element("b", "", role), content);

function skipButton() {
  const button = element("button", "", keyCap("S"), "Skip");
  button.type = "button";
  button.addEventListener("click", () => submit("skip"));
  return button;
}

async function submit(answer) {
  const waited = performance.now() - state.seen;
  if (state.busy || !state.item || (answer !== "skip" && (!state.ready || waited < CALM))) return;
  state.busy = true;
  note("");
  try {
    const body = { annotator: state.name, item: state.item.id, answer };
    if (state.ready) body.seconds = waited / 1000;
    state.task.choose(answer);
    const [next] = await Promise.all([call("/api/answer", body), new Promise((done) => setTimeout(done, FLASH))]);
    if (location.hash !== "#agreement") show(next);
  } catch (problem) {
    state.task?.choose(null);
    if (problem.status === 409) await route();
    note(problem.message);
  } finally {
    state.busy = false;
  }
}

async function undo() {
  if (state.busy || state.name === null || $("undo").hidden) return;
  state.busy = true;
  try {
    show(await call("/api/undo", { annotator: state.name }));
    note("Taken back. Answer again.");
  } catch (problem) {
    note(problem.message);
  } finally {
    state.busy = false;
  }
}

// --- keys -----------------------------------------------------------------------------------------------------

function keys(task) {
  const common = [[["U"], "take the last answer back"], [["S"], "skip this item"], [["?"], "this list"]];
  const own = {
    pair: [[["1", "2"], "the first one, the second one"], [["0"], "tie"], [["←", "→", "Enter"], "move, and choose"]],
    best: [[["1", "…", "9"], "this one is best"], [["0"], "all alike"], [["←", "→", "Enter"], "move, and choose"]],
    rank: [
      [["1", "…", "9"], "take a card (also ↑ and ↓)"], [["←", "→"], "move it to better, to worse"],
      [["="], "tie it with the one before"], [["Enter"], "done with this order"],
    ],
    segments: [
      [["1", "2"], "the first, the second clip is better here"], [["0"], "tie"], [["←", "→"], "segment before, after"],
      [["W"], "loop the whole clips"], [["Space"], "pause"], [["Enter"], "done with these clips"],
    ],
  };
  return [...own[task], ...common];
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open || event.target.closest("input")) return;
  if (event.key === "?") return $("keys").showModal();
  if ($("work").hidden && $("finished").hidden) return;
  const key = event.key.toLowerCase();
  if (key === "u" && !event.repeat) return void undo();
  if (!state.task || state.busy) return;
  if (key === "s" && !event.repeat) return void submit("skip");
  // Enter and Space on a button are that button's
  if (["enter", " "].includes(key) && event.target.closest("button, a")) return;
  if (event.repeat && !key.startsWith("arrow")) return;
  if (state.task.key(key)) event.preventDefault();
}

document.addEventListener("keydown", onKey);
// a button clicked by mouse would keep the focus, and with it Enter and Space
document.addEventListener("click", (event) => event.detail && event.target.closest("#work button, header button")?.blur());
$("keys").addEventListener("close", () => document.activeElement?.blur());
window.addEventListener("hashchange", route);
$("name-form").addEventListener("submit", (event) => { event.preventDefault(); enter($("name").value); });
$("undo").addEventListener("click", undo);
$("help").addEventListener("click", () => $("keys").showModal());
$("who").addEventListener("click", leave);
start().catch((problem) => note(problem.message));
