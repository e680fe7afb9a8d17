// The page without this script is complete; the script finds one feature by its number.
// Every text goes through textContent: a token is never parsed as HTML.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const column = Object.fromEntries(data.columns.map((name, number) => [name, number]));
  const row = new Map(data.features.map((feature, number) => [feature, number]));
  const classes = ["kept", "blurred", "lost", "silenced"];
  document.documentElement.classList.add("scripted");

  function element(tag, text, name) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  }

  const shown = (value) => (value === null ? "n/a" : String(value));
  const percent = (value) => (value === null ? "n/a" : `${(100 * value).toFixed(2)} %`);

  function facts(values) {
    const list = element("dl", undefined, "inline");
    const pairs = [
      ["r", values[column.r] === null ? "n/a" : `${shown(values[column.r])} (${shown(values[column.low])} to ${shown(values[column.high])})`],
      ["direction", shown(values[column.direction])],
      ["gain", shown(values[column.gain])],
      ["Jaccard", shown(values[column.jaccard])],
      ["fires", `${percent(values[column.density])} \u2192 ${percent(values[column.density_after])}`],
      ["peak", shown(values[column.peak])],
      ["causal", shown(values[column.causal])],
    ];
    for (const [name, value] of pairs) {
      const item = element("div");
      item.append(element("dt", name), element("dd", value));
      list.append(item);
    }
    return list;
  }

  function context(example) {
    const line = element("p", undefined, "context");
    const top = Math.max(1e-12, ...example.before, ...example.after);
    example.tokens.forEach((token, number) => {
      const piece = element("span", token, "token");
      piece.style.setProperty("--before", Math.max(0, example.before[number] / top));
      piece.style.setProperty("--after", Math.max(0, example.after[number] / top));
      piece.title = `dense ${example.before[number].toFixed(3)}, converted ${example.after[number].toFixed(3)}`;
      line.append(piece);
    });
    return line;
  }

  function bonds(values) {
    const table = element("table", undefined, "heat"), head = element("tr"), body = element("tr");
    values.forEach((bond, number) => {
      head.append(element("th", data.matrices[number]));
      const cell = element("td", bond < 0 ? "" : String(bond));
      if (bond >= 0) cell.setAttribute("style", `--shade:${Math.min(1, bond / data.ranks[number])}`);
      body.append(cell);
    });
    table.append(head, body);
    const box = element("div", undefined, "scroll");
    box.append(element("h4", "critical bonds"), table);
    return box;
  }

  function show(feature) {
    const number = row.get(feature);
    $("result").replaceChildren();
    if (number === undefined) {
      $("found").textContent = "not among the features measured here";
      return;
    }
    $("found").textContent = "";
    const values = data.values[number], name = classes[values[column.class]] ?? "unmeasured";
    const card = element("article", undefined, "card feature"), title = element("h4", `feature ${feature}`);
    title.append(element("span", data.verdicts[number] ? `${name}, certain` : name, `pill ${name}`));
    card.append(title, facts(values));
    const examples = data.examples[feature] ?? [];
    card.append(...examples.map(context));
    if (examples.length === 0) card.append(element("p", "No context was kept of this feature.", "none"));
    if (data.critical[number]) card.append(bonds(data.critical[number]));
    $("result").append(card);
  }

  $("search").addEventListener("input", () => {
    const text = $("search").value.trim();
    if (/^\d+$/.test(text)) return show(Number(text));
    $("result").replaceChildren();
    $("found").textContent = text ? "a feature is a number" : `${data.features.length} measured features`;
  });
  for (const link of document.querySelectorAll("[data-feature]")) {
    link.addEventListener("click", () => {
      $("search").value = link.dataset.feature;
      show(Number(link.dataset.feature));
      $("features").scrollIntoView();
    });
  }
  $("found").textContent = `${data.features.length} measured features`;
})();
