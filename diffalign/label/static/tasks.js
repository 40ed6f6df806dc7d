// What the four tasks look like and what their keys do.
import { Cards, button, element } from "./cards.js";

function columns(node, count) {
  const across = count <= 4 ? count : Math.ceil(count / Math.ceil(count / 4));
  node.style.setProperty("--columns", across);
  node.style.setProperty("--wish", count > across ? "32vh" : count > 2 ? "44vh" : "56vh");
}

class Choice extends Cards {
  constructor(item, submit, pair) {
    super(item, pair ? "two versus" : "many");
    this.submit = submit;
    this.question = pair ? "Which one is better?" : "Which one is best?";
    this.at = null;
    if (!pair) columns(this.node, item.shown.length);
    this.cards.forEach((card, place) => {
      if (item.shown[place].kind === "text") return; // its words can be selected
      card.classList.add("pick");
      card.addEventListener("click", () => submit(place));
    });
    const tie = button("", "0", pair ? "Tie" : "All alike", () => submit("tie"));
    this.actions = pair
      ? [button("first", "1", "First", () => submit(0)), tie, button("second", "2", "Second", () => submit(1))]
      : [...this.cards.map((_, place) => button("number", String(place + 1), "", () => submit(place))), tie];
    this.tie = tie;
    if (typeof item.previous === "number") this.move(item.previous);
  }

  move(place) {
    this.at = Math.min(Math.max(place, 0), this.cards.length - 1);
    this.mark("cursor", [this.at]);
    this.cards[this.at].scrollIntoView?.({ block: "nearest" });
  }

  choose(answer) {
    this.mark("chosen", typeof answer === "number" ? [answer] : []);
    this.tie.classList.toggle("primary", answer === "tie");
  }

  key(key) {
    if (key === "0") this.submit("tie");
    else if (/^[1-9]$/.test(key) && Number(key) <= this.cards.length) this.submit(Number(key) - 1);
    else if (key === "arrowleft" || key === "arrowup") this.move((this.at ?? 1) - 1);
    else if (key === "arrowright" || key === "arrowdown") this.move(this.at === null ? this.cards.length === 2 ? 1 : 0 : this.at + 1);
    else if (key === "enter" && this.at !== null) this.submit(this.at);
    else return false;
    return true;
  }
}

// --- rankings -------------------------------------------------------------------------------------------------

const ordinal = (n) => `${n}${n % 100 - n % 10 === 10 ? "th" : ["th", "st", "nd", "rd"][n % 10] ?? "th"}`;

class Ranking extends Cards {
  constructor(item, submit) {
    super(item, "many order");
    this.submit = submit;
    this.question = "Put them in order, the best first.";
    columns(this.node, item.shown.length);
    this.order = item.shown.map((_, place) => ({ place, tied: false })); // tied: with the one before
    if (Array.isArray(item.previous)) {
      this.order = item.previous.flatMap((group) => group.map((place, index) => ({ place, tied: index > 0 })));
    }
    this.at = this.order[0].place;
    this.cards.forEach((card, place) => this.equip(card, place));
    this.actions = [button("primary", "Enter", "Done", () => this.finish())];
    this.arrange();
  }

  equip(card, place) {
    const head = element("div", "place", element("span", ""), card.querySelector(".badge"));
    const shift = element("div", "shift");
    for (const [text, label, act] of [["←", "better", -1], ["=", "tie with the one before", 0], ["→", "worse", 1]]) {
      const small = element("button", "", text);
      small.type = "button";
      small.title = label;
      small.setAttribute("aria-label", label);
      small.addEventListener("click", () => { this.at = place; act ? this.shift(act) : this.tie(); });
      shift.append(small);
    }
    card.prepend(head);
    card.append(shift);
    card.draggable = true;
    card.addEventListener("click", () => { this.at = place; this.arrange(); });
    card.addEventListener("dragstart", (event) => {
      this.at = place;
      event.dataTransfer.setData("text/plain", String(place));
      event.dataTransfer.effectAllowed = "move";
      card.classList.add("drag");
    });
    card.addEventListener("dragend", () => { this.mark("drag", []); this.mark("over", []); this.arrange(); });
    card.addEventListener("dragover", (event) => { event.preventDefault(); this.mark("over", [place]); });
    card.addEventListener("drop", (event) => {
      event.preventDefault();
      this.moveTo(this.index(place));
    });
  }

  index(place) {
    return this.order.findIndex((one) => one.place === place);
  }

  shift(by) {
    this.moveTo(this.index(this.at) + by);
  }

  moveTo(target) {
    const from = this.index(this.at);
    if (target < 0 || target >= this.order.length || target === from) return this.arrange();
    if (!this.order[from].tied && this.order[from + 1]) this.order[from + 1].tied = false;
    const [moved] = this.order.splice(from, 1);
    moved.tied = Boolean(this.order[target]?.tied); // among cards that tie it joins them
    this.order.splice(target, 0, moved);
    this.arrange();
  }

  tie() {
    const index = this.index(this.at);
    if (index > 0) this.order[index].tied = !this.order[index].tied;
    this.arrange();
  }

  arrange() {
    this.order[0].tied = false;
    let rank = 0;
    this.order.forEach(({ place, tied }, index) => {
      if (!tied) rank = index + 1;
      const card = this.cards[place];
      const ties = tied || this.order[index + 1]?.tied;
      card.querySelector(".place span").replaceChildren(ordinal(rank), ...(ties ? [element("small", "", " tie")] : []));
      card.classList.toggle("tied", tied);
      const [better, equal, worse] = card.querySelectorAll(".shift button");
      better.disabled = equal.disabled = index === 0;
      worse.disabled = index === this.order.length - 1;
      equal.setAttribute("aria-pressed", String(tied));
      if (this.node.children[index] !== card) this.node.insertBefore(card, this.node.children[index] ?? null);
    });
    this.mark("cursor", [this.at]);
  }

  finish() {
    const groups = [];
    for (const { place, tied } of this.order) tied ? groups.at(-1).push(place) : groups.push([place]);
    this.submit(groups);
  }

  choose(answer) {
    this.mark("chosen", Array.isArray(answer) ? this.order.map((one) => one.place) : []);
  }

  key(key) {
    const step = { arrowup: -1, arrowdown: 1 }[key];
    if (/^[1-9]$/.test(key) && Number(key) <= this.cards.length) this.at = Number(key) - 1;
    else if (step) this.at = this.order[Math.min(Math.max(this.index(this.at) + step, 0), this.order.length - 1)].place;
    else if (key === "arrowleft") this.shift(-1);
    else if (key === "arrowright") this.shift(1);
    else if (key === "=" || key === "t") this.tie();
    else if (key === "enter") this.finish();
    else return false;
    this.arrange();
    return true;
  }
}

// --- segments -------------------------------------------------------------------------------------------------

class Segments extends Cards {
  constructor(item, submit) {
    super(item, "two side versus");
    this.submit = submit;
    this.seconds = item.segment_seconds;
    this.question = "Which clip is better in each segment?";
    this.verdicts = Array.isArray(item.previous) ? item.previous : Array(item.segments).fill(null);
    this.at = 0;
    this.whole = false;
    this.time = element("span", "time");
    this.play = button("", "Space", "Pause", () => this.pause());
    this.all = button("", "W", "Whole clip", () => this.loopAll());
    this.cells = this.verdicts.map((_, index) => {
      const cell = element("button", "cell");
      cell.type = "button";
      cell.addEventListener("click", () => this.go(index));
      return cell;
    });
    const cards = this.node;
    cards.style.setProperty("--wish", "44vh");
    this.node = element("div", "", cards, element("div", "transport", this.play, this.all, this.time),
      element("div", "timeline", ...this.cells));
    this.done = button("primary", "Enter", "Done", () => this.finish());
    this.actions = [
      button("first", "1", "First", () => this.judge(0)), button("", "0", "Tie", () => this.judge("tie")),
      button("second", "2", "Second", () => this.judge(1)), this.done,
    ];
    this.loaded.then(() => this.go(0));
    this.draw();
  }

  go(index) {
    this.at = Math.min(Math.max(index, 0), this.cells.length - 1);
    this.whole = false;
    this.loop.set(this.at * this.seconds, this.at === this.cells.length - 1 ? Infinity : (this.at + 1) * this.seconds);
    this.draw();
  }

  loopAll() {
    this.whole = !this.whole;
    if (this.whole) this.loop.set(0, Infinity);
    else this.go(this.at);
    this.draw();
  }

  pause() {
    this.loop.toggle();
    this.draw();
  }

  judge(verdict) {
    this.verdicts[this.at] = verdict;
    const later = [...this.verdicts.keys()].map((i) => (this.at + 1 + i) % this.verdicts.length);
    const open = later.find((index) => this.verdicts[index] === null);
    if (open !== undefined) this.go(open);
    else this.draw();
  }

  finish() {
    const open = this.verdicts.indexOf(null);
    if (open < 0) this.submit(this.verdicts);
    else this.go(open);
  }

  draw() {
    this.cells.forEach((cell, index) => {
      const verdict = this.verdicts[index];
      cell.className = `cell ${verdict === null ? "" : `v${verdict}`} ${index === this.at && !this.whole ? "now" : ""}`;
      cell.textContent = verdict === null ? "·" : verdict === "tie" ? "=" : String(verdict + 1);
      cell.setAttribute("aria-label", `segment ${index + 1}`);
    });
    const from = this.at * this.seconds;
    const until = Math.min(from + this.seconds, this.loop.end());
    const span = Number.isFinite(until) ? `, ${from.toFixed(1)} to ${until.toFixed(1)} s` : "";
    this.time.replaceChildren(...(this.whole ? ["whole clips"] : [
      element("b", "", `Segment ${this.at + 1} of ${this.cells.length}`), span,
    ]));
    this.play.lastChild.textContent = this.loop.paused ? "Play" : "Pause";
    this.all.lastChild.textContent = this.whole ? "One segment" : "Whole clip";
    this.done.disabled = this.verdicts.includes(null);
  }

  choose(answer) {
    this.done.classList.toggle("chosen", Array.isArray(answer));
  }

  key(key) {
    if (key === "1" || key === "2") this.judge(Number(key) - 1);
    else if (key === "0") this.judge("tie");
    else if (key === "arrowleft") this.go(this.at - 1);
    else if (key === "arrowright") this.go(this.at + 1);
    else if (key === "w") this.loopAll();
    else if (key === " ") this.pause();
    else if (key === "enter") this.finish();
    else return false;
    return true;
  }
}

export function makeTask(task, item, submit) {
  if (task === "rank") return new Ranking(item, submit);
  if (task === "segments") return new Segments(item, submit);
  return new Choice(item, submit, task === "pair");
}
