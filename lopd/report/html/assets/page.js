"use strict";
// Helpers that all panels use: elements, numbers, tables, and the data.
const lopd = {};

// Returns an element. Strings among the children become text and never HTML.
lopd.el = function (tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined)
      node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
};

lopd.unpack = async function () {
  const packed = document.getElementById("data").textContent.trim();
  const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
};

lopd.count = (value) => value.toLocaleString("en-US");
lopd.fixed = (value, digits) =>
  value === null || value === undefined ? "" : value.toFixed(digits);
lopd.signed = (value, digits) => (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(digits);
lopd.percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;

// Four significant digits, without exponents where people do not need them.
lopd.short = function (value) {
  if (value === null || value === undefined) return "";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
};

lopd.duration = function (seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 1) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const rest = String(whole % 60).padStart(2, "0");
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes}:${rest}`;
  return `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}:${rest}`;
};

// Returns a table in a box. A column is {title, number, value} and perhaps {text, term}: value(row)
// is what is sorted by, text(row) what is shown, term an entry of the list of terms. The roles keep
// it a table for a screen reader where it is shown as a list of rows.
lopd.table = function (caption, columns, rows, { sortable = false } = {}) {
  const el = lopd.el;
  const body = el("tbody", { role: "rowgroup" });
  const shown = (column, row) => {
    const found = column.text ? column.text(row) : column.value(row);
    return found === null || found === undefined ? "" : found;
  };
  const cell = (column, index, row) => el(index ? "td" : "th", {
    class: column.number ? "number" : "", scope: index ? null : "row",
    role: index ? "cell" : "rowheader", "data-title": column.title }, shown(column, row));
  const fill = (sorted) => body.replaceChildren(...sorted.map((row) =>
    el("tr", { role: "row" }, columns.map((column, index) => cell(column, index, row)))));
  const heads = columns.map((column) => {
    const head = el("th", { scope: "col", role: "columnheader",
      class: column.number ? "number" : "" });
    if (!sortable) head.append(column.term ? lopd.term(column.term, column.title) : column.title);
    else {
      const sort = () => {
        const up = head.getAttribute("aria-sort") === "descending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const sorted = [...rows].sort((one, other) => {
          const [a, b] = [column.value(one), column.value(other)];
          // What is not known comes last in either order.
          if (a === null || b === null) return (a === null) - (b === null);
          const order = typeof a === "string" ? a.localeCompare(b) : a - b;
          return up ? order : -order;
        });
        fill(sorted);
      };
      head.append(el("button", { type: "button", onclick: sort }, column.title));
    }
    return head;
  });
  fill(rows);
  const box = el("div", { class: "scroll" },
    el("table", { class: sortable ? "sortable" : "", role: "table" }, el("caption", {}, caption),
      el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, heads)), body));
  lopd.stacking.observe(box);
  return box;
};

// A table that is wider than its place becomes a list of rows, so that no column is out of sight.
// In the next frame: whoever changes sizes while sizes are observed is told again and again.
lopd.stacking = new ResizeObserver((entries) => requestAnimationFrame(() => {
  for (const { target: box } of entries) {
    const width = box.clientWidth;
    if (!width || box.dataset.width === String(width)) continue;
    box.dataset.width = String(width);
    box.classList.remove("stacked");
    box.classList.toggle("stacked", box.scrollWidth > width);
  }
}));

// A word with its meaning: a pointer shows it, and the link leads to the list of terms.
lopd.term = function (name, text) {
  const meaning = document.getElementById(`term-${name}`).nextElementSibling.textContent;
  return lopd.el("a", { class: "term", href: `#term-${name}`,
    title: meaning.trim().replace(/\s+/g, " ") }, text);
};

lopd.select = function (label, options, onchange) {
  const box = lopd.el("select", { onchange: () => onchange(box.value) },
    options.map(([value, text]) => lopd.el("option", { value }, text)));
  return { box, field: lopd.el("div", {}, lopd.el("label", {}, label, box)) };
};

// A link into the documentation, or the name of the page where no copy of it is known.
lopd.doc = function (page) {
  const name = page.split("#")[0];
  if (!lopd.data.docs) return lopd.el("span", { class: "muted" }, `See docs/${page}`);
  // A site has HTML in place of Markdown.
  const site = /^https?:/.test(lopd.data.docs) || lopd.data.docs === ".";
  const path = site ? page.replace(/\.md/, ".html") : page;
  return lopd.el("a", { href: `${lopd.data.docs}/${path}` }, `Read docs/${name}`);
};

lopd.colour = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(name).trim();
