// Charts: uPlot draws them, and each has a sentence and a table that say the same.
lopd.charts = [];
lopd.dashes = [[], [7, 4], [2, 3], [9, 3, 2, 3], [14, 3]];
// The style of a line by its number.
lopd.style = (index) => index % lopd.dashes.length;

lopd.sample = function (index) {
  const dash = lopd.dashes[lopd.style(index)].join(" ");
  const holder = lopd.el("span");
  // An SVG of our own numbers: nothing from the data.
  holder.innerHTML =
    `<svg width="34" height="10" aria-hidden="true"><line x1="0" y1="5" x2="34" y2="5" ` +
    `stroke="var(--run-${lopd.style(index)})" stroke-width="3" stroke-dasharray="${dash}"/></svg>`;
  return holder.firstChild;
};

lopd.key = (names) =>
  lopd.el("ul", { class: "key", "aria-label": "Lines of the charts" },
    names.map((name, index) => lopd.el("li", {}, lopd.sample(index), name)));

// One sentence that says what a line looks like, for those who do not see it.
lopd.told = function (line, chart) {
  const known = line.y.map((value, index) => [line.x[index], value])
    .filter((pair) => pair[1] !== null);
  if (!known.length) return `${line.name}: no figure.`;
  const of = chart.unit === "%" ? "%" : ` ${chart.unit}`;
  if (chart.names) return `${line.name}: ${known.map(([x, value]) =>
    `${chart.names[x]} ${lopd.short(value)}${of}`).join(", ")}.`;
  const [first, last] = [known[0], known[known.length - 1]];
  const values = known.map((pair) => pair[1]);
  const low = values.reduce((a, b) => Math.min(a, b));
  const high = values.reduce((a, b) => Math.max(a, b));
  return `${line.name}: ${lopd.short(first[1])}${of} at ${first[0]}, ${lopd.short(last[1])}${of} ` +
    `at ${last[0]}; lowest ${lopd.short(low)}, highest ${lopd.short(high)}.`;
};

// The entry of the list of terms for a chart.
lopd.chartTerms = { reverse_kl: "reverse-kl", held_out_reverse_kl: "reverse-kl",
  training_reverse_kl: "reverse-kl", fresh_reverse_kl: "reverse-kl", accuracy: "interval",
  advantage: "deviation", fresh_advantage: "quantile",
  advantage_by_quantile: "quantile", end_token_advantage: "deviation",
  effective_sample_share: "effective-sample-share", clipped_share: "clipped-share",
  chi_square: "chi-square", gradient_gap: "chi-square", student_entropy: "entropy",
  grad_norm: "grad-norm", truncated_share: "cut-off", expert_max_load: "experts",
  expert_entropy_share: "experts", lengths: "quantile", deviations: "quantile",
  entropies: "entropy" };

// Returns a figure. A chart has {title, unit, log, x_title, lines} and perhaps {name, note, names,
// marks}: marks are the steps of refreshes with the number of their run,
// names stand at the axis in place of numbers, and then points are not joined. With {key} the chart
// says whose its lines are. A line has {name, index, x, y} and perhaps {low, high, band, n}.
lopd.chart = function (chart) {
  const el = lopd.el;
  const at = (x) => (chart.names ? chart.names[x] : `${chart.x_title} ${x}`);
  const sentences = chart.lines.map((line) => lopd.told(line, chart));
  const plot = el("div", {
    class: "plot", tabindex: "0", role: "img",
    "aria-label": `${chart.title}. ${sentences.join(" ")} Arrow keys go through the points.`,
  });
  const readout = el("p", { class: "readout", "aria-live": "polite" }, chart.note || "");
  const details = el("details", {}, el("summary", {}, "Figures as a table"));
  details.addEventListener("toggle", () => {
    if (details.open && details.childElementCount === 1) details.append(chartTable());
  });
  const term = lopd.chartTerms[chart.name];
  const caption = el("figcaption", {}, `${chart.title} `,
    term ? lopd.term(term, "(what is it?)") : null);
  const key = chart.key ? lopd.key(chart.lines.map((line) => line.name)) : null;
  const figure = el("figure", {}, caption, key, plot, readout, details);
  const parts = [];
  for (const line of chart.lines) {
    parts.push([line.x, line.y]);
    if (line.low) parts.push([line.x, line.low], [line.x, line.high]);
  }
  const data = uPlot.join(parts);
  lopd.charts.push({ plot, draw });
  return figure;

  function chartTable() {
    const columns = [{ title: chart.x_title, number: true, value: (row) => row,
      text: (row) => (chart.names ? chart.names[row] : String(row)) }];
    for (const line of chart.lines) {
      const own = (row, values) => values[line.x.indexOf(row)] ?? null;
      columns.push({ title: line.name, number: true, value: (row) => own(row, line.y),
        text: (row) => lopd.short(own(row, line.y)) });
      if (line.low) columns.push({ title: line.band, number: true,
        value: (row) => own(row, line.low), text: (row) => (own(row, line.low) === null ? ""
          : `${lopd.short(own(row, line.low))} to ${lopd.short(own(row, line.high))}`) });
      if (line.n) columns.push({ title: "prompts", number: true,
        value: (row) => own(row, line.n) });
    }
    return lopd.table(`${chart.title}, ${chart.unit}`, columns, data[0]);
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
        text += ` (${line.band}: ${lopd.short(data[column + 1][index])} to ` +
          `${lopd.short(data[column + 2][index])})`;
      const place = line.x.indexOf(data[0][index]);
      if (line.n && place >= 0) text += `, ${lopd.count(line.n[place])} prompts`;
      told.push(text);
      column += line.low ? 3 : 1;
    }
    readout.textContent = `${at(data[0][index])}: ${told.join("; ")}`;
  }

  function series() {
    const found = [{ label: chart.x_title }];
    const bands = [];
    for (const line of chart.lines) {
      const stroke = lopd.colour(`--run-${lopd.style(line.index)}`);
      // A few points are seen better as dots, and models are no steps that a line could join.
      const apart = chart.names ? { paths: () => null } : {};
      found.push({ label: line.name, stroke, width: 2, dash: lopd.dashes[lopd.style(line.index)],
        spanGaps: true, points: { show: line.x.length < 30, size: 6, fill: stroke }, ...apart });
      if (!line.low) continue;
      const edge = { stroke, width: 0.5, points: { show: Boolean(chart.names), size: 3 },
        spanGaps: true, ...apart };
      found.push({ ...edge, label: "low" }, { ...edge, label: "high" });
      if (!chart.names)
        bands.push({ series: [found.length - 1, found.length - 2], fill: `${stroke}22` });
    }
    return { series: found, bands };
  }

  function axes() {
    const axis = { stroke: lopd.colour("--muted"), labelSize: 18, labelGap: 0,
      labelFont: "12px system-ui, sans-serif", grid: { stroke: lopd.colour("--line"), width: 1 },
      ticks: { stroke: lopd.colour("--line"), width: 1 } };
    const values = (u, ticks) => ticks.map((tick) => (tick === null ? "" : lopd.short(tick)));
    const names = chart.names ? { splits: () => chart.names.map((_, index) => index),
      values: (u, ticks) => ticks.map((tick) => chart.names[tick]) } : {};
    // A name may have two lines.
    const size = chart.names?.some((name) => name.includes("\n")) ? 52 : 30;
    return [{ ...axis, size, label: chart.x_title, ...names },
      { ...axis, size: 58, label: chart.unit, values }];
  }

  // A dotted line at each refresh, in the colour of its run.
  function markRefreshes(u) {
    for (const { step, index } of chart.marks || []) {
      const x = Math.round(u.valToPos(step, "x", true));
      if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
      u.ctx.save();
      u.ctx.strokeStyle = lopd.colour(`--run-${lopd.style(index)}`);
      u.ctx.setLineDash([2, 4]);
      u.ctx.beginPath();
      u.ctx.moveTo(x, u.bbox.top);
      u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
      u.ctx.stroke();
      u.ctx.restore();
    }
  }

  function draw() {
    plot.replaceChildren();
    const positive = data.slice(1).every((row) => row.every((value) =>
      value === null || value === undefined || value > 0));
    const [first, last] = [data[0][0], data[0][data[0].length - 1]];
    const space = chart.names ? 0.5 : 1;
    const range = chart.names || first === last ? [first - space, last + space] : undefined;
    const view = new uPlot({
      width: Math.max(220, plot.clientWidth), height: 240, ...series(),
      scales: { x: { time: false, range }, y: { distr: chart.log && positive ? 3 : 1 } },
      axes: axes(), cursor: { drag: { x: false, y: false } }, legend: { show: false },
      hooks: { setCursor: [(u) => say(u.cursor.idx)], draw: [markRefreshes] },
    }, data, plot);
    let place = -1;
    plot.onkeydown = (event) => {
      const moves = { ArrowRight: 1, ArrowLeft: -1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      place = Math.min(Math.max(place + moves[event.key], 0), data[0].length - 1);
      view.setCursor({ left: view.valToPos(data[0][place], "x"), top: 20 }, false);
      say(place);
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

