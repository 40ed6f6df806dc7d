// The page of agreement.
import { element, media } from "./cards.js";

const share = (value) => (value === null ? "–" : `${(100 * value).toFixed(0)} %`);
const number = (value, digits) => (value === null ? "–" : value.toFixed(digits));

function table(heads, rows) {
  const row = (kind, cells) => element("tr", "", ...cells.map((cell) => element(kind, "", String(cell))));
  return element("div", "scroll", element("table", "", row("th", heads), ...rows.map((cells) => row("td", cells))));
}

function tile(value, what) {
  return element("div", "", element("b", "", value), what);
}

function words(answer, task) {
  const name = (value) => (value === "tie" ? "tie" : String(value + 1));
  if (task === "rank") return answer.map((group) => group.map(name).join(" = ")).join(" > ");
  if (task === "segments") return answer.map((value) => (value === "tie" ? "=" : name(value))).join(" ");
  return name(answer);
}

function thumb(candidate, place) {
  const badge = element("span", "badge", String(place + 1));
  if (candidate.kind !== "text") return element("div", "thumb", badge, media(candidate.kind, candidate.url).node);
  return element("div", "thumb words", badge, plain(candidate.text));
}

const plain = (text) => (typeof text === "string" ? text : text.map((t) => `${t.role}: ${t.content}`).join("\n"));

function dispute(one, task) {
  const left = element("div", "", element("p", "", plain(one.prompt)), element("div", "thumbs", ...one.shown.map(thumb)));
  const votes = one.given.map(({ annotator, answer }) =>
    element("tr", "", element("td", "", annotator), element("td", "", words(answer, task))));
  return element("div", "dispute", left, element("table", "", ...votes));
}

export function showAgreement(box, found, task) {
  const several = found.annotators.length > 1;
  const nodes = [
    element("h1", "", "Agreement"),
    element("div", "tiles",
      tile(number(found.alpha, 2), "Krippendorff’s alpha"),
      tile(share(found.share), `raw agreement (${found.pairs} comparisons)`),
      tile(String(found.disputes), found.disputes === 1 ? "disputed item" : "disputed items"),
      tile(`${found.answered} of ${found.items}`, "items answered")),
    element("p", "soft", several
      ? "Alpha is 1 where all agree and 0 where they agree as often as by chance. Verdicts are nominal; skips do not count."
      : "Agreement needs two annotators who answer the same items."),
    element("h2", "", "Annotators"),
    table(["name", "answers", "skips", "ties", "first shown preferred", "median time"], found.annotators.map((a) => [
      a.annotator, a.answers, a.skips, share(a.ties), share(a.left), a.seconds === null ? "–" : `${number(a.seconds, 1)} s`,
    ])),
  ];
  if (found.between.length) {
    nodes.push(element("h2", "", "Between two annotators"), table(
      ["annotators", "raw agreement", "comparisons"],
      found.between.map((row) => [`${row.first}, ${row.second}`, share(row.share), row.units])));
  }
  if (found.disputed.length) {
    nodes.push(element("h2", "", "Disputed items"));
    if (found.disputed.length < found.disputes) {
      nodes.push(element("p", "soft", `The ${found.disputed.length} most disputed of ${found.disputes}.`));
    }
    nodes.push(...found.disputed.map((one) => dispute(one, task)));
  }
  nodes.push(element("div", "last"));
  box.replaceChildren(...nodes);
}
