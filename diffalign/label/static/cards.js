// What all tasks are made of: nodes, media, clips in step, cards.

export function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children); // strings become text nodes
  return node;
}

export const keyCap = (name) => element("kbd", "", name);

export function button(className, key, text, act) {
  const node = element("button", className, keyCap(key), text);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}

// A picture or clip, and a promise of whether it could be loaded.
export function media(kind, url) {
  const node = document.createElement(kind === "video" ? "video" : "img");
  node.className = "media";
  const loaded = new Promise((done) => {
    node.addEventListener(kind === "video" ? "loadeddata" : "load", () => {
      // small pictures are enlarged: show their pixels, not a blur
      node.classList.toggle("pixelated", Math.max(node.naturalWidth ?? node.videoWidth, 1) <= 128);
      done(true);
    });
    node.addEventListener("error", () => {
      node.replaceWith(element("p", "failed", "This file could not be loaded."));
      done(false);
    });
  });
  if (kind === "video") {
    node.muted = node.playsInline = true;
    node.preload = "auto";
  } else {
    node.alt = "";
    node.draggable = false;
  }
  node.src = url;
  return { node, loaded };
}

function body(candidate) {
  if (candidate.kind !== "text") return media(candidate.kind, candidate.url);
  const loaded = Promise.resolve(true);
  if (typeof candidate.text === "string") return { node: element("div", "reading", candidate.text), loaded };
  const turns = candidate.text.map(({ role, content }) =>
    element("div", role === "user" ? "turn user" : "turn", element("b", "", role), content));
  return { node: element("div", "chat", ...turns), loaded };
}

// --- clips ----------------------------------------------------------------------------------------------------

// Plays clips in step, from one time to another, over and over.
class Loop {
  constructor(clips) {
    this.clips = clips;
    this.paused = false;
    this.span = [0, Infinity];
    this.frame = requestAnimationFrame(() => this.step());
  }

  end() {
    return Math.min(this.span[1], ...this.clips.map((clip) => clip.duration || Infinity));
  }

  set(from, to) {
    this.span = [from, to];
    this.rewind();
  }

  rewind() {
    for (const clip of this.clips) clip.currentTime = this.span[0];
  }

  toggle() {
    this.paused = !this.paused;
    for (const clip of this.clips) if (this.paused) clip.pause();
  }

  step() {
    this.frame = requestAnimationFrame(() => this.step());
    if (this.clips.some((clip) => clip.seeking || clip.readyState < 2)) {
      // one that waits for data holds the others
      for (const clip of this.clips) clip.pause();
      return;
    }
    if (this.clips.some((clip) => clip.ended || clip.currentTime >= this.end() - 0.005)) {
      this.rewind();
      return;
    }
    if (this.paused) return;
    const [lead, ...others] = this.clips;
    for (const clip of others) if (Math.abs(clip.currentTime - lead.currentTime) > 0.06) clip.currentTime = lead.currentTime;
    for (const clip of this.clips) if (clip.paused) clip.play().catch(() => {});
  }

  stop() {
    cancelAnimationFrame(this.frame);
    for (const clip of this.clips) clip.pause();
  }
}

// --- cards ----------------------------------------------------------------------------------------------------

export class Cards {
  constructor(item, className) {
    const bodies = item.shown.map(body);
    this.cards = bodies.map(({ node }, place) => {
      const card = element("div", "card", element("span", "badge", String(place + 1)), node);
      card.dataset.place = place;
      return card;
    });
    this.node = element("div", `cards ${className}`, ...this.cards);
    if (item.shown.every((one) => one.kind === "text")) this.node.classList.add("words");
    this.loaded = Promise.all(bodies.map((one) => one.loaded)).then((all) => all.every(Boolean));
    const clips = bodies.map((one) => one.node).filter((node) => node.tagName === "VIDEO");
    this.loop = clips.length ? new Loop(clips) : null;
  }

  mark(className, places) {
    this.cards.forEach((card, place) => card.classList.toggle(className, places.includes(place)));
  }

  stop() {
    this.loop?.stop();
  }
}
