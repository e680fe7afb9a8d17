// The page without this script is complete; the script adds choosing, sorting and reading values.
// Every text goes through textContent: a name in a report is never parsed as HTML.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const { matrices, start } = JSON.parse($("data").textContent);
  const metrics = JSON.parse($("metrics").textContent);
  const cells = all(".cell");
  let metric = metrics[0];
  document.documentElement.classList.add("scripted");

  // ---- tooltip -------------------------------------------------------------------------------
  const tip = $("tip");
  const hideTip = () => { tip.hidden = true; };
  function showTip(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 6))}px`;
    tip.style.top = `${y + 20 + box.height > innerHeight ? y - box.height - 12 : y + 18}px`;
  }

  // ---- map -----------------------------------------------------------------------------------
  function paint(key) {
    metric = metrics.find((one) => one.key === key);
    $("cells").dataset.metric = $("gradient").dataset.metric = key;
    $("scale-name").textContent = metric.label;
    $("scale-low").textContent = metric.low;
    $("scale-high").textContent = metric.high;
    $("scale-meaning").textContent = metric.meaning;
    for (const cell of cells) {
      const number = Number(cell.dataset.number), shade = metric.shade[number];
      cell.style.setProperty("--shade", shade ?? 0);
      cell.classList.toggle("empty", shade === null);
      cell.textContent = metric.cell[number];
      cell.setAttribute("aria-label", describe(number));
    }
    for (const other of all(".other")) {
      other.querySelector("[data-text]").textContent = metric.text[Number(other.dataset.number)];
    }
  }

  const describe = (number) => `${matrices[number].name}: ${metric.label} ${metric.text[number]}`;

  function element(tag, text) {
    const made = document.createElement(tag);
    made.textContent = text;
    return made;
  }

  function choose(number) {
    const matrix = matrices[number];
    for (const marked of all(".chosen")) marked.classList.remove("chosen");
    for (const same of all(`.cell[data-number="${number}"], .other[data-number="${number}"], tr[data-number="${number}"]`)) same.classList.add("chosen");
    for (const cell of cells) cell.tabIndex = Number(cell.dataset.number) === number ? 0 : -1;
    if (!cells.some((cell) => cell.tabIndex === 0)) cells[0].tabIndex = 0;
    $("detail-name").textContent = matrix.name;
    $("detail-format").textContent = matrix.format;
    $("detail-facts").replaceChildren(...matrix.facts.map(([name, value]) => {
      const row = document.createElement("div");
      row.append(element("dt", name), element("dd", value));
      return row;
    }));
    $("detail-entropy").hidden = matrix.entropy.length === 0;
    $("detail-entropy").querySelector("tbody").replaceChildren(...matrix.entropy.map((texts) => {
      const row = document.createElement("tr");
      row.append(...texts.map((text) => element("td", text)));
      return row;
    }));
    showSpectrum(matrix);
  }

  function showSpectrum(matrix) {
    const plot = all(".spectrum").find((one) => one.dataset.kind === matrix.kind);
    const lines = (root) => all(`[data-line="dense-${matrix.block}"], [data-line="converted-${matrix.block}"]`, root);
    for (const open of all(".spectrum.picked")) open.classList.remove("picked");
    const found = plot ? lines(plot) : [];
    $("detail-spectrum").hidden = found.length === 0;
    if (found.length === 0) return;
    plot.classList.add("picked");
    for (const line of found) line.classList.add("chosen");
    const copy = plot.querySelector("svg").cloneNode(true);
    for (const line of all("[data-line]:not(.chosen)", copy)) line.remove();
    $("detail-spectrum").querySelector(".plot").replaceChildren(copy);
  }

  function neighbour(cell, key) {
    const turned = matchMedia("(max-width: 720px)").matches;
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (!(key in steps)) return null;
    let [column, row] = turned ? [...steps[key]].reverse() : steps[key];
    column += Number(cell.dataset.column);
    row += Number(cell.dataset.row);
    return cells.find((one) => Number(one.dataset.column) === column && Number(one.dataset.row) === row);
  }

  for (const cell of cells) {
    const number = Number(cell.dataset.number);
    cell.addEventListener("click", () => choose(number));
    cell.addEventListener("pointermove", (event) => showTip(describe(number), event.clientX, event.clientY));
    cell.addEventListener("pointerleave", hideTip);
    cell.addEventListener("keydown", (event) => {
      const next = neighbour(cell, event.key);
      if (!next) return;
      event.preventDefault();
      choose(Number(next.dataset.number));
      next.focus();
    });
  }
  for (const other of all(".other")) other.addEventListener("click", () => choose(Number(other.dataset.number)));
  for (const input of all("input[name=metric]")) input.addEventListener("change", () => paint(input.value));
  if (cells.length) choose(start);

  // ---- entropy curves ------------------------------------------------------------------------
  function showCut(cut) {
    for (const panels of all(".panels[data-cut]")) panels.classList.toggle("shown", panels.dataset.cut === cut);
  }
  for (const input of all("input[name=cut]")) input.addEventListener("change", () => showCut(input.value));
  showCut("0");

  const nats = (value) => (value === null ? "n/a" : value.toFixed(3));
  for (const plot of all(".curve")) {
    const points = JSON.parse(plot.dataset.points);
    const blocks = Object.keys(points).map(Number);
    const { left, right, from, to } = plot.querySelector("svg").dataset;
    const guide = plot.appendChild(document.createElement("span"));
    guide.className = "guide";
    guide.hidden = true;
    const nearest = (event) => {
      const box = plot.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width - left) / (right - left);
      const block = Number(from) + share * (to - from);
      return blocks.reduce((best, one) => (Math.abs(one - block) < Math.abs(best - block) ? one : best));
    };
    plot.addEventListener("pointermove", (event) => {
      const block = nearest(event), [dense, converted, random] = points[block];
      const share = Number(left) + ((block - from) / (to - from)) * (right - left);
      guide.style.left = `${100 * share}%`;
      guide.hidden = false;
      showTip(`block ${block}\nrandom ${nats(random)} nats\ndense ${nats(dense)}\nconverted ${nats(converted)}`, event.clientX, event.clientY);
    });
    plot.addEventListener("pointerleave", () => { guide.hidden = true; hideTip(); });
    plot.addEventListener("click", (event) => {
      const block = nearest(event);
      const number = matrices.findIndex((one) => one.block === block && one.kind === plot.dataset.kind);
      if (number >= 0) choose(number);
    });
  }

  // ---- table ---------------------------------------------------------------------------------
  const body = $("table").tBodies[0];
  const rows = [...body.rows];
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  function sortBy(header, column) {
    const down = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const one of all("#table thead th")) one.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
    const keyed = rows.map((row) => [row.cells[column].dataset.value, row]);
    const numeric = column !== 1;
    keyed.sort(([a], [b]) => {
      if (!numeric) return down * compare(a, b);
      const [x, y] = [parseFloat(a), parseFloat(b)];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return down * (x - y);
    });
    body.append(...keyed.map(([, row]) => row));
  }
  for (const button of all("[data-sort]")) {
    button.addEventListener("click", () => sortBy(button.closest("th"), Number(button.dataset.sort)));
  }
  function filter() {
    const words = $("filter").value.toLowerCase().split(/\s+/), format = $("format").value;
    let shown = 0;
    for (const row of rows) {
      const name = matrices[Number(row.dataset.number)].name.toLowerCase();
      const keep = words.every((word) => name.includes(word)) && (!format || row.dataset.format === format);
      row.hidden = !keep;
      shown += keep;
    }
    $("shown").textContent = `${shown} of ${rows.length}`;
  }
  $("filter").addEventListener("input", filter);
  $("format").addEventListener("change", filter);
  for (const link of all(".link")) {
    link.addEventListener("click", () => {
      if (!$("detail")) return;
      choose(Number(link.dataset.number));
      $("map").scrollIntoView();
    });
  }
})();
