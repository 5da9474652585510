"use strict";
(() => {
  const { cards, images } = JSON.parse(document.getElementById("card-data").textContent);
  const form = document.getElementById("filters");
  const list = document.getElementById("cards");
  const more = document.getElementById("more");
  const AT_ONCE = 20;
  let found = [];

  function make(tag, text, name) {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text ?? "";
    if (name) element.className = name;
    return element;
  }

  function line(head, answer, score, change) {
    const row = make("tr");
    const name = make("th", head);
    name.scope = "row";
    const said = make("td", answer ?? "no answer");
    said.dir = "auto";
    const cell = make("td");
    if (change) cell.append(make("span", change, `change ${change}`));
    row.append(name, said, make("td", score === null ? "" : String(Number(score.toPrecision(4))), "score"), cell);
    return row;
  }

  function draw({ card, rows }) {
    const item = make("li", undefined, "card");
    const side = make("div");
    if (card.image === null) {
      side.append(make("p", "no image here", "none"));
    } else {
      const image = make("img");
      image.alt = `Image of ${card.sample}`;
      image.decoding = "async";
      image.src = `data:image/jpeg;base64,${images[card.image]}`;
      side.append(image);
    }
    const table = make("table");
    const body = table.createTBody();
    body.append(line("target", card.target ?? "not given", null), line("full model", card.answer, card.score));
    body.append(...rows.map((row) => line(row.plan, row.answer, row.score, row.change)));
    const text = make("div");
    const question = make("p", card.question ?? "The question is not known.", "question");
    question.dir = "auto";
    // What all cards have in common has no filter.
    const names = ["model", "task", "kind"].filter((name) => form.elements[name]).map((name) => card[name]);
    const of = [...names, `sample ${card.sample}`].filter(Boolean).join(", ");
    text.append(question, make("p", of, "of"), table);
    item.append(side, text);
    return item;
  }

  function show(focus) {
    const shown = list.children.length;
    list.append(...found.slice(shown, shown + AT_ONCE).map(draw));
    const left = found.length - list.children.length;
    // The button goes with the last card; who pressed it by keyboard goes on at the first of the new cards.
    more.hidden = left === 0;
    more.textContent = `Show ${Math.min(left, AT_ONCE)} more of ${left}`;
    if (focus) {
      list.children[shown].tabIndex = -1;
      list.children[shown].focus();
    }
  }

  function filter() {
    const wanted = Object.fromEntries(new FormData(form));
    const fits = (item, names) => names.every((name) => !wanted[name] || item[name] === wanted[name]);
    found = cards
      .filter((card) => fits(card, ["model", "task", "kind"]))
      .map((card) => ({ card, rows: card.rows.filter((row) => fits(row, ["plan", "change"])) }))
      .filter(({ rows }) => rows.length);
    const worse = ({ rows }) => rows.filter(({ change }) => change === "worse").length;
    found.sort((a, b) => worse(b) - worse(a));
    const answers = found.reduce((sum, { rows }) => sum + rows.length, 0);
    document.getElementById("found").textContent =
      `${found.length} question${found.length === 1 ? "" : "s"}, ${answers} changed answer${answers === 1 ? "" : "s"}`;
    list.replaceChildren();
    show(false);
  }

  form.addEventListener("change", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => show(true));
  filter();
})();
