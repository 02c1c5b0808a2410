// Charts: uPlot draws them, and each has a sentence and a table that say the same.
lopd.charts = [];
lopd.dashes = [[], [7, 4], [2, 3], [9, 3, 2, 3]];

lopd.sample = function (index) {
  const dash = lopd.dashes[index % 4].join(" ");
  const holder = lopd.el("span");
  // An SVG of our own numbers: nothing from the data.
  holder.innerHTML =
    `<svg width="34" height="10" aria-hidden="true"><line x1="0" y1="5" x2="34" y2="5" ` +
    `stroke="var(--run-${index % 4})" stroke-width="3" stroke-dasharray="${dash}"/></svg>`;
  return holder.firstChild;
};

lopd.key = (names) =>
  lopd.el("ul", { class: "key", "aria-label": "Lines of the charts" },
    names.map((name, index) => lopd.el("li", {}, lopd.sample(index), name)));

// One sentence that says what a line looks like, for those who do not see it.
lopd.told = function (name, x, y, unit) {
  const known = y.map((value, index) => [x[index], value]).filter((pair) => pair[1] !== null);
  if (!known.length) return `${name}: no figure.`;
  const [first, last] = [known[0], known[known.length - 1]];
  const values = known.map((pair) => pair[1]);
  const [low, high] = [values.reduce((a, b) => Math.min(a, b)),
    values.reduce((a, b) => Math.max(a, b))];
  const of = unit ? ` ${unit}` : "";
  return `${name}: ${lopd.short(first[1])}${of} at ${first[0]}, ${lopd.short(last[1])}${of} ` +
    `at ${last[0]}; lowest ${lopd.short(low)}, highest ${lopd.short(high)}.`;
};

// Returns a figure. A chart has {title, unit, log, xTitle, lines}, and a line {name, index, x, y}
// and perhaps {low, high}.
lopd.chart = function (chart) {
  const el = lopd.el;
  const xTitle = chart.xTitle || "step";
  const sentences = chart.lines.map((line) => lopd.told(line.name, line.x, line.y, chart.unit));
  const plot = el("div", {
    class: "plot", tabindex: "0", role: "img",
    "aria-label": `${chart.title}. ${sentences.join(" ")} Arrow keys go through the points.`,
  });
  const readout = el("p", { class: "readout", "aria-live": "polite" });
  const details = el("details", {}, el("summary", {}, "Figures as a table"));
  details.addEventListener("toggle", () => {
    if (details.open && details.childElementCount === 1) details.append(chartTable());
  });
  const unit = chart.unit ? ` (${chart.unit})` : "";
  const figure = el("figure", {}, el("figcaption", {}, chart.title + unit), plot, readout, details);
  const parts = [];
  for (const line of chart.lines) {
    parts.push([line.x, line.y]);
    if (line.low) parts.push([line.x, line.low], [line.x, line.high]);
  }
  const data = uPlot.join(parts);
  lopd.charts.push({ plot, draw });
  return figure;

  function chartTable() {
    const columns = [{ title: xTitle, number: true, value: (row) => row }];
    chart.lines.forEach((line) => columns.push({
      title: line.name, number: true,
      value: (row) => line.y[line.x.indexOf(row)] ?? null,
      text: (row) => lopd.short(line.y[line.x.indexOf(row)] ?? null),
    }));
    return lopd.table(chart.title + unit, columns, data[0]);
  }

  function say(index) {
    if (index === null || index === undefined) return;
    const told = [];
    let column = 1;
    for (const line of chart.lines) {
      const value = data[column][index];
      let text = `${line.name} ${value === null || value === undefined ? "\u2013"
        : lopd.short(value)}`;
      if (line.low && data[column + 1][index] !== undefined)
        text += ` (95%: ${lopd.short(data[column + 1][index])} to ` +
          `${lopd.short(data[column + 2][index])})`;
      told.push(text);
      column += line.low ? 3 : 1;
    }
    readout.textContent = `${xTitle} ${data[0][index]}: ${told.join("; ")}`;
  }

  function draw() {
    plot.replaceChildren();
    const series = [{ label: xTitle }];
    const bands = [];
    for (const line of chart.lines) {
      const stroke = lopd.colour(`--run-${line.index % 4}`);
      // A few points are seen better as dots.
      series.push({ label: line.name, stroke, width: 2, dash: lopd.dashes[line.index % 4],
        spanGaps: true, points: { show: line.x.length < 30, size: 6, fill: stroke } });
      if (line.low) {
        const edge = { stroke, width: 0.5, points: { show: false }, spanGaps: true };
        series.push({ ...edge, label: "low" }, { ...edge, label: "high" });
        bands.push({ series: [series.length - 1, series.length - 2], fill: `${stroke}22` });
      }
    }
    const positive = data.slice(1).every((row) => row.every((value) => !(value <= 0)));
    const axis = { stroke: lopd.colour("--muted"), grid: { stroke: lopd.colour("--line"),
      width: 1 }, ticks: { stroke: lopd.colour("--line"), width: 1 } };
    const values = (u, ticks) => ticks.map((tick) => (tick === null ? "" : lopd.short(tick)));
    const one = data[0].length === 1;
    const view = new uPlot({
      width: Math.max(220, plot.clientWidth), height: 220, series, bands,
      scales: { x: { time: false, range: one ? [data[0][0] - 1, data[0][0] + 1] : undefined },
        y: { distr: chart.log && positive ? 3 : 1 } },
      axes: [{ ...axis, size: 34 }, { ...axis, size: 62, values }],
      cursor: { drag: { x: false, y: false } }, legend: { show: false },
      hooks: { setCursor: [(u) => say(u.cursor.idx)] },
    }, data, plot);
    let at = -1;
    plot.onkeydown = (event) => {
      const moves = { ArrowRight: 1, ArrowLeft: -1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      at = Math.min(Math.max(at + moves[event.key], 0), data[0].length - 1);
      view.setCursor({ left: view.valToPos(data[0][at], "x"), top: 20 }, false);
      say(at);
    };
  }
};

// Draws the charts that are in view, and the others when they come into view.
lopd.watchCharts = function () {
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const chart = lopd.charts.find((one) => one.plot === entry.target);
      if (entry.isIntersecting && chart && !chart.drawn) {
        chart.drawn = true;
        chart.draw();
      }
    }
  }, { rootMargin: "400px" });
  lopd.charts.forEach((chart) => seen.observe(chart.plot));
  const again = () => lopd.charts.filter((one) => one.drawn).forEach((one) => one.draw());
  let waiting = 0;
  let width = window.innerWidth;
  addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(again, 150);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
};

lopd.showCurves = function (section) {
  const { charts, runs, knobs } = lopd.data;
  if (!charts.length) return false;
  const el = lopd.el;
  if (runs.length > 1) section.append(lopd.key(runs.map((run) => run.name)));
  const figures = (group) => charts.filter((one) => one.group === group).map((one) =>
    lopd.chart({ ...one, lines: one.series.map((line) =>
      ({ ...line, index: line.source, name: runs[line.source].name })) }));
  section.append(el("div", { class: "charts" }, figures("main")));
  const more = figures("more");
  if (more.length) {
    section.append(el("details", {}, el("summary", {}, `${more.length} more curves`),
      el("div", { class: "charts" }, more)));
  }
  section.append(el("p", { class: "muted" },
    "The reverse KL of a step is measured on frozen rollouts, and that of the overview on fresh " +
    "responses to held-out prompts. They are of other prompts and may differ many times over."));
  if (knobs.length) {
    const columns = [{ title: "knob", value: (row) => row[0], text: (row) =>
      el("code", {}, row[0]) }];
    runs.forEach((run, index) => columns.push({ title: run.name, value: (row) =>
      String(row[index + 1]) }));
    section.append(lopd.table("Knobs in which the runs differ", columns, knobs));
  } else if (runs.length > 1) {
    section.append(el("p", {}, "No recorded knob differs between these runs."));
  }
  return true;
};
